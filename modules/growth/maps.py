"""Index maps of widening: which source index each target index is a copy of, and the factors that go with it.

c_i counts the copies of index i's source, κ = D2 / D. Maps: `even` (i mod n), `random` (new indices copy any source),
`powers` (4 copies of a residual channel, 2 of anything else, whose scales sqrt(1 / c) and 1 / c are exact in bfloat16;
the few indices that no power fills are at first not written, or not read), `zero` (no copies: all new indices are such
a rest).

Methods: `iso` keeps the function for any ratio and map. A residual channel's copies are scaled by sqrt(κ / c), which
keeps the mean square of the stream and so RMSNorm; gains undo the scale, and whoever reads copies divides by c. `fpi`
(Net2Net, arXiv 1511.05641; bert2BERT, arXiv 2110.07143) copies without scales: exact for whole ratios alone.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from modules.config import ModelConfig
from modules.errors import InputError
from modules.growth.operation import seeded_generator
from modules.growth.roles import Axis

Map = Literal["even", "random", "powers", "zero"]
Scaling = Literal["iso", "fpi"]


@dataclass(frozen=True)
class AxisMap:
    """How one axis grows.

    Attributes:
        index: the source index of each target index.
        weight: factor on the parameter, per target index.
        gradient: factor on the parameter's gradient that follows from it, per target index.
        live: 1, or 0 for what is no copy, but fills the size up.
        draws: matrices' entries that fill up are drawn anew; else they are copies, times `weight`.
    """

    index: Tensor
    weight: Tensor
    gradient: Tensor
    live: Tensor
    draws: bool = False

    def apply(self, tensor: Tensor, axis: int, scale: Tensor) -> Tensor:
        """Copy along one axis, times a factor per index."""
        grown = tensor.index_select(axis, self.index.to(tensor.device))
        return grown.mul_(along(scale, axis, grown))

    @property
    def num_source(self) -> int:
        """Indices before."""
        return int(self.index.max()) + 1

    @cached_property
    def new(self) -> Tensor:
        """Target indices that are not the first copy of their source. Heads are new inside their groups, not behind
        all old ones."""
        place = torch.arange(len(self.index))
        return place[self.firsts[self.index] < place]

    @property
    def firsts(self) -> Tensor:
        """The first copy of each source index."""
        place = torch.arange(len(self.index))
        return torch.full((self.num_source,), len(self.index)).scatter_reduce(0, self.index, place, "amin")

    @property
    def is_uniform(self) -> bool:
        """Whether all sources have equally many live copies, and nothing only fills the size up."""
        return bool(self.live.all()) and len(torch.bincount(self.index).unique()) == 1

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Live copies of an input two by two: the first one of each pair, per target index, and signs +1 and -1
        (float64); 0 for what has no partner."""
        first, sign = torch.arange(len(self.index)), torch.zeros(len(self.index), dtype=torch.float64)
        single: dict[int, int] = {}
        for place, (source, live) in enumerate(zip(self.index.tolist(), self.live.tolist(), strict=True)):
            partner = single.pop(source, None) if live else None
            if partner is not None:
                first[place], sign[partner], sign[place] = partner, 1.0, -1.0
            elif live:
                single[source] = place
        return first, sign


@dataclass(frozen=True)
class Copies:
    """Which source index each target index is a copy of.

    Attributes:
        index: the source index.
        live: 1, or 0 for those that only fill the size up (float64).
    """

    index: Tensor
    live: Tensor

    @property
    def count(self) -> Tensor:
        """c: how many live ones share the source, per target index (float64)."""
        return torch.bincount(self.index, weights=self.live)[self.index]


@dataclass(frozen=True)
class MapRules:
    """How indices are chosen and scaled in one widening."""

    kind: Map = "even"
    scaling: Scaling = "iso"
    seed: int = 0

    def copies(self, name: str, source: int, target: int, base: int = 2) -> Copies:
        """The copies of one axis; `base` is the power that suits it, `name` what is random depends on."""
        if self.kind == "powers":
            return _in_powers(source, target, base)
        live = torch.ones(target, dtype=torch.float64)
        index = torch.arange(target) % source
        if self.kind == "random":
            generator = seeded_generator(self.seed, "map", name)
            index[source:] = torch.randint(source, (target - source,), generator=generator)
        if self.kind == "zero":
            live[source:] = 0.0
        return Copies(index, live)


def along(factors: Tensor, axis: int, tensor: Tensor) -> Tensor:
    """Factors per index of one axis, shaped to multiply a tensor."""
    shape = [1] * tensor.ndim
    shape[axis] = -1
    return factors.to(tensor).view(shape)


def axis_maps(source: ModelConfig, target: ModelConfig, rules: MapRules) -> dict[Axis, AxisMap]:
    """The map of every axis role that differs between two architectures."""
    maps: dict[Axis, AxisMap] = {}
    if source.dim != target.dim:
        maps |= _residual_maps(source, target, rules)
    hidden_layers = (
        ("hidden", source.ffn_size, target.ffn_size, Axis.HIDDEN_OUT, Axis.HIDDEN_IN),
        ("experts", source.expert_size, target.expert_size, Axis.EXPERT_HIDDEN_OUT, Axis.EXPERT_HIDDEN_IN),
        ("shared", source.shared_size, target.shared_size, Axis.SHARED_HIDDEN_OUT, Axis.SHARED_HIDDEN_IN),
    )
    for name, before, after, out_axis, in_axis in hidden_layers:
        if before != after:
            maps |= _copy_maps(rules.copies(name, before, after), out_axis, in_axis)
    if (source.num_heads, source.kv_heads) != (target.num_heads, target.kv_heads):
        maps |= _head_maps(source, target, rules)
    return maps


def widened_eps(source: ModelConfig, dim: int, rules: MapRules) -> float:
    """The norms' epsilon on the other side: where the stream's mean square falls with the width, it does too."""
    return source.norm_eps * source.dim / dim if _stream_falls(source, rules) else source.norm_eps


def _stream_falls(source: ModelConfig, rules: MapRules) -> bool:
    """Whether what is not copied stays unscaled: the stream's mean square falls to 1 / κ. That needs an epsilon which
    other norms, whose input stays what it was, do not share."""
    shares_eps = source.qk_norm or source.norm_structure != "prenorm"
    return rules.kind in ("powers", "zero") and rules.scaling == "iso" and not shares_eps


def _in_powers(source: int, target: int, base: int) -> Copies:
    again: list[int] = []
    room, level = target - source, 1
    while room >= level * (base - 1):  # level copies of each become level * base, from the first index on
        raised = min(source, room // (level * (base - 1)))
        again += [place for place in range(raised) for _ in range(level * (base - 1))]
        room -= raised * level * (base - 1)
        level *= base
    rest = [place % source for place in range(room)]
    live = torch.tensor([1.0] * (target - room) + [0.0] * room, dtype=torch.float64)
    return Copies(torch.tensor([*range(source), *again, *rest]), live)


def _residual_maps(source: ModelConfig, target: ModelConfig, rules: MapRules) -> dict[Axis, AxisMap]:
    copies = rules.copies("residual", source.dim, target.dim, base=4)
    index, live, c = copies.index, copies.live, copies.count
    ones = torch.ones_like(c)
    reader = AxisMap(index, 1 / c, ones, live, draws=True)
    if rules.scaling == "fpi":
        written = AxisMap(index, live, 1 / c, live)
        tied = AxisMap(index, 1 / c, ones, live)
        gains = {Axis.NORM_GAIN: written, Axis.FINAL_GAIN: tied if target.tie_embeddings else written}
        readers = {Axis.RESIDUAL_IN: reader, Axis.HEAD_IN: reader}
        return {Axis.RESIDUAL_OUT: written, Axis.POST_GAIN: written, **readers, **gains}
    k = target.dim / source.dim
    scale = 1.0 if _stream_falls(source, rules) else k  # the factor on the stream's mean square, times k
    writer, gain = _normed_maps(copies, k, scale)
    of_the_stream = AxisMap(index, 1 / (k * c).sqrt(), (k / c).sqrt(), live, draws=True)  # no norm undoes its scale
    # A head that is the embedding has the scale of a writer instead of a reader's 1 / c.
    tied = AxisMap(index, ones / math.sqrt(k * scale), math.sqrt(k * scale) / c, live)
    return {
        Axis.RESIDUAL_OUT: writer,
        Axis.RESIDUAL_IN: of_the_stream if target.norm_structure == "postnorm" else reader,
        Axis.HEAD_IN: reader,
        Axis.NORM_GAIN: gain,
        Axis.POST_GAIN: AxisMap(index, live, 1 / c, live),  # the writer before it has the scale of the stream already
        Axis.FINAL_GAIN: tied if target.tie_embeddings else gain,
    }


def _normed_maps(copies: Copies, k: float, scale: float) -> tuple[AxisMap, AxisMap]:
    """Of what is copied in front of a norm so that its mean square becomes scale / k of what it was, and of the gains
    behind it that undo the copies' scale."""
    index, live, c = copies.index, copies.live, copies.count
    writer = AxisMap(index, (scale / c).sqrt() * live, 1 / (scale * c).sqrt(), live)
    return writer, AxisMap(index, (c / k).sqrt(), (k / c).sqrt() / c, live)


def _copy_maps(copies: Copies, out_axis: Axis, in_axis: Axis) -> dict[Axis, AxisMap]:
    """Producers are copied and consumers share the input among the copies."""
    index, live, c = copies.index, copies.live, copies.count
    ones = torch.ones_like(c)
    return {out_axis: AxisMap(index, ones, 1 / c, live, draws=True), in_axis: AxisMap(index, live / c, ones, live)}


def _head_maps(source: ModelConfig, target: ModelConfig, rules: MapRules) -> dict[Axis, AxisMap]:
    normed_together = source.qk_norm and source.qk_norm_scope == "projection"
    if normed_together and rules.kind in ("powers", "zero"):
        rules = replace(rules, kind="even")  # a norm over all heads would see those that are not written
    kv, heads = _head_copies(source, target, rules)
    maps = _copy_maps(heads, Axis.HEADS_OUT, Axis.HEADS_IN)
    kv_map = AxisMap(kv.index, torch.ones_like(kv.count), 1 / kv.count, torch.ones_like(kv.count))
    maps |= {Axis.KEY_HEADS_OUT: kv_map, Axis.VALUE_HEADS_OUT: kv_map}
    if normed_together and rules.scaling == "iso":
        k, kv_k = target.num_heads / source.num_heads, target.kv_heads / source.kv_heads
        maps[Axis.HEADS_OUT], maps[Axis.QUERY_GAIN] = _normed_maps(heads, k, k)
        maps[Axis.KEY_HEADS_OUT], maps[Axis.KEY_GAIN] = _normed_maps(kv, kv_k, kv_k)
    elif normed_together:
        maps |= {Axis.QUERY_GAIN: maps[Axis.HEADS_OUT], Axis.KEY_GAIN: kv_map}
    return {axis: _per_channel(axis_map, source.head_size) for axis, axis_map in maps.items()}


def _head_copies(source: ModelConfig, target: ModelConfig, rules: MapRules) -> tuple[Copies, Copies]:
    """Copies of key-value heads and of query heads. Query heads stay with their key-value head: the tiled order would
    mix groups. Whole groups are copied, with room for more query heads in each; where groups become smaller instead
    (GQA to MHA), each key-value head is repeated, and its query heads are shared out among the repetitions."""
    group, new_group = source.num_heads // source.kv_heads, target.num_heads // target.kv_heads
    head = torch.arange(target.num_heads)
    of_kv, of_group = head // new_group, head % new_group
    if new_group >= group:
        kv = rules.copies("groups", source.kv_heads, target.kv_heads)
        inside = rules.copies("heads", group, new_group)
        return kv, Copies(kv.index[of_kv] * group + inside.index[of_group], kv.live[of_kv] * inside.live[of_group])
    times = target.kv_heads // source.kv_heads
    if target.kv_heads % source.kv_heads or times * new_group < group:
        raise InputError(
            f"growth target has num_heads={target.num_heads}, num_kv_heads={target.kv_heads}: the source's groups of "
            f"{group} query heads neither stay whole nor divide; raise num_heads, or choose num_kv_heads="
            f"{source.kv_heads}, or a multiple of it with at least {source.num_heads} query heads"
        )
    inside = rules.copies("heads", group, times * new_group)
    place = (of_kv % times) * new_group + of_group
    kv = Copies(torch.arange(target.kv_heads) // times, torch.ones(target.kv_heads, dtype=torch.float64))
    return kv, Copies(of_kv // times * group + inside.index[place], inside.live[place])


def _per_channel(axis_map: AxisMap, head_size: int) -> AxisMap:
    """From heads to their channels."""
    return AxisMap(
        (axis_map.index[:, None] * head_size + torch.arange(head_size)).flatten(),
        axis_map.weight.repeat_interleave(head_size),
        axis_map.gradient.repeat_interleave(head_size),
        axis_map.live.repeat_interleave(head_size),
        axis_map.draws,
    )

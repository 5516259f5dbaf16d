"""Widening by `iso`: exact for any ratio of widths, any number of heads and tied or untied embeddings.

Every target index is a copy of a source index. c_i counts the copies of i's source, κ = D2 / D.
With a residual channel's copies scaled by sqrt(κ / c), the mean square of the stream stays what it was, and so does
RMSNorm; gains undo the scale, and whoever reads copies divides by c.

Copies are as even in number as can be (i mod n), or come in powers: of 4 for residual channels, of 2 elsewhere. Their
scales sqrt(1 / c) and 1 / c are then exact in bfloat16, and what is left of κ goes into gains and the norms' epsilon.
The few indices that no power fills are at first not written, or not read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.config import ModelConfig
from modules.errors import InputError
from modules.growth.operation import Moments, ParameterSource, seeded_generator
from modules.growth.roles import IN_AXES, Axis, role_of
from modules.optim import ParameterFactors


@dataclass(frozen=True)
class AxisMap:
    """How one axis grows.

    Attributes:
        index: the source index of each target index.
        weight: factor on the parameter, per target index.
        gradient: factor on the parameter's gradient that follows from it, per target index.
        live: 1, or 0 for inputs that are zero, per target index; None: none is.
    """

    index: Tensor
    weight: Tensor
    gradient: Tensor
    live: Tensor | None = None

    def apply(self, tensor: Tensor, axis: int, scale: Tensor) -> Tensor:
        """Copy along one axis, times a factor per index."""
        shape = [1] * tensor.ndim
        shape[axis] = -1
        grown = tensor.index_select(axis, self.index.to(tensor.device))
        return grown * scale.to(tensor).view(shape)


@dataclass(frozen=True)
class Widen:
    """Grow dim, feed-forward width and heads of `source` to those of `config`; layers and experts stay.

    Args:
        split_noise: standard deviation, relative to the weights' own, of noise on split inputs that adds up to zero
            over the copies of one input. The function stays the same and the copies learn different things; without it
            (0) copies stay equal for ever under mapped optimizer state.
        in_powers: copies come in powers, so that rounding weights to bfloat16 loses nothing.
    """

    source: ParameterSource
    config: ModelConfig
    split_noise: float = 0.0
    seed: int = 0
    in_powers: bool = False

    def __post_init__(self) -> None:
        _check_widths(self.source.config, self.config)
        object.__setattr__(self, "_maps", axis_maps(self.source.config, self.config, self.in_powers))

    @property
    def maps(self) -> Mapping[Axis, AxisMap]:
        """The map of each axis role that grows."""
        return self._maps  # type: ignore[attr-defined]

    def weight(self, name: str) -> Tensor:
        """The grown parameter."""
        grown = self.source.weight(name)
        for axis, role in enumerate(role_of(name).axes):
            if role in self.maps:
                axis_map = self.maps[role]
                grown = axis_map.apply(grown, axis, axis_map.weight)
                if self.split_noise and role in IN_AXES:
                    grown = grown + self._zero_sum_noise(grown, axis, axis_map, name)
        return grown

    def moments(self, name: str) -> Moments | None:
        """Adam's state, mapped so that the grown model takes the source's steps (exactly for integer ratios)."""
        before = self.source.moments(name)
        if before is None:
            return None
        first, second = before.first, before.second
        for axis, role in enumerate(role_of(name).axes):
            if role in self.maps:
                axis_map = self.maps[role]
                first = axis_map.apply(first, axis, axis_map.gradient)
                second = axis_map.apply(second, axis, axis_map.gradient.square())
        return Moments(first, second, before.step)

    def factors(self, name: str) -> ParameterFactors:
        """Learning rate follows the weight's scale, eps the gradient's, weight decay undoes the learning rate's."""
        scale, slope = 1.0, 1.0
        for role in role_of(name).axes:
            if role in self.maps:
                scale *= self.maps[role].weight.mean().item()
                slope *= self.maps[role].gradient.mean().item()
        return self.source.factors(name) * ParameterFactors(lr=scale, weight_decay=1 / scale, eps=slope)

    def _zero_sum_noise(self, grown: Tensor, axis: int, axis_map: AxisMap, name: str) -> Tensor:
        generator = seeded_generator(self.seed, "split_noise", name)
        noise = torch.randn(grown.shape, generator=generator, dtype=torch.float32).to(grown)
        index = axis_map.index.to(grown.device)
        live = (torch.ones_like(axis_map.weight) if axis_map.live is None else axis_map.live).to(grown)
        num_source = int(axis_map.index.max()) + 1
        shape = [1] * grown.ndim
        shape[axis] = -1
        sums = torch.zeros(*grown.shape[:axis], num_source, *grown.shape[axis + 1 :], dtype=grown.dtype)
        sums = sums.to(grown.device).index_add_(axis, index, noise * live.view(shape))
        copies = torch.bincount(index, weights=live, minlength=num_source)[index]
        centred = noise - sums.index_select(axis, index) / copies.to(grown).view(shape)
        return centred * (self.split_noise * grown.std())


def axis_maps(source: ModelConfig, target: ModelConfig, in_powers: bool = False) -> dict[Axis, AxisMap]:
    """The map of every axis role that differs between two architectures."""
    maps: dict[Axis, AxisMap] = {}
    if source.dim != target.dim:
        maps |= _residual_maps(source, target, in_powers)
    hidden_layers = (
        (source.ffn_size, target.ffn_size, Axis.HIDDEN_OUT, Axis.HIDDEN_IN),
        (source.expert_size, target.expert_size, Axis.EXPERT_HIDDEN_OUT, Axis.EXPERT_HIDDEN_IN),
        (source.shared_size, target.shared_size, Axis.SHARED_HIDDEN_OUT, Axis.SHARED_HIDDEN_IN),
    )
    for before, after, out_axis, in_axis in hidden_layers:
        if before != after:
            maps |= _copy_maps(_copies(before, after, 2 if in_powers else None), out_axis, in_axis)
    if (source.num_heads, source.kv_heads) != (target.num_heads, target.kv_heads):
        normed_together = source.qk_norm and source.qk_norm_scope == "projection"
        maps |= _head_maps(source, target, 2 if in_powers and not normed_together else None, normed_together)
    return maps


def norm_eps_of_powers(source: ModelConfig, dim: int) -> float:
    """The norms' epsilon behind a widening in powers, where the mean square of the stream falls with the width."""
    return source.norm_eps if _stream_scale(source, dim) != 1 else source.norm_eps * source.dim / dim


def _stream_scale(source: ModelConfig, dim: int) -> float:
    """The factor on the stream's mean square times κ, of a widening in powers: 1, but where other norms share the
    epsilon, whose input stays what it was."""
    shares_eps = source.qk_norm or source.norm_structure != "prenorm"
    return dim / source.dim if shares_eps else 1.0


def _check_widths(source: ModelConfig, target: ModelConfig) -> None:
    pairs = {
        "dim": (source.dim, target.dim),
        "ffn_dim": (source.ffn_size, target.ffn_size),
        "num_heads": (source.num_heads, target.num_heads),
        "num_kv_heads": (source.kv_heads, target.kv_heads),
    }
    if source.moe is not None:
        pairs["moe.expert_dim"] = (source.expert_size, target.expert_size)
    for name, (before, after) in pairs.items():
        if after < before:
            raise InputError(
                f"growth target {name}={after} is smaller than its source's {before}; choose {name} >= {before}"
            )
    assert source.head_size == target.head_size, "a head keeps its channels"
    if target.num_heads // target.kv_heads < source.num_heads // source.kv_heads:
        raise InputError(
            f"growth target has {target.num_heads // target.kv_heads} query heads for each key-value head and its "
            f"source {source.num_heads // source.kv_heads}; raise num_heads or lower num_kv_heads"
        )


@dataclass(frozen=True)
class _Copies:
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


def _copies(source: int, target: int, base: int | None = None) -> _Copies:
    """Copy each index in turn, or such that each has a power of `base` live copies."""
    if base is None:
        return _Copies(torch.arange(target) % source, torch.ones(target, dtype=torch.float64))
    again: list[int] = []
    room, level = target - source, 1
    while room >= level * (base - 1):  # level copies of each become level * base, from the first index on
        raised = min(source, room // (level * (base - 1)))
        again += [place for place in range(raised) for _ in range(level * (base - 1))]
        room -= raised * level * (base - 1)
        level *= base
    rest = [place % source for place in range(room)]
    live = torch.tensor([1.0] * (target - room) + [0.0] * room, dtype=torch.float64)
    return _Copies(torch.tensor([*range(source), *again, *rest]), live)


def _residual_maps(source: ModelConfig, target: ModelConfig, in_powers: bool) -> dict[Axis, AxisMap]:
    copies = _copies(source.dim, target.dim, 4 if in_powers else None)
    index, c = copies.index, copies.count
    k = target.dim / source.dim
    ones = torch.ones_like(c)
    scale = _stream_scale(source, target.dim) if in_powers else k
    writer, gain = _normed_maps(copies, k, scale)
    reader = AxisMap(index, 1 / c, ones, copies.live)
    of_the_stream = AxisMap(index, 1 / (k * c).sqrt(), (k / c).sqrt(), copies.live)  # no norm undoes its scale
    # A head that is the embedding has the scale of a writer instead of a reader's 1 / c.
    tied_gain = AxisMap(index, ones / math.sqrt(k * scale), math.sqrt(k * scale) / c)
    return {
        Axis.RESIDUAL_OUT: writer,
        Axis.RESIDUAL_IN: of_the_stream if target.norm_structure == "postnorm" else reader,
        Axis.HEAD_IN: reader,
        Axis.NORM_GAIN: gain,
        Axis.POST_GAIN: AxisMap(index, copies.live, 1 / c),  # the writer before it has the scale of the stream already
        Axis.FINAL_GAIN: tied_gain if target.tie_embeddings else gain,
    }


def _normed_maps(copies: _Copies, k: float, scale: float) -> tuple[AxisMap, AxisMap]:
    """Of what is copied in front of a norm so that its mean square becomes scale / k of what it was, and of the gains
    behind it that undo the copies' scale."""
    index, c = copies.index, copies.count
    writer = AxisMap(index, (scale / c).sqrt() * copies.live, 1 / (scale * c).sqrt())
    return writer, AxisMap(index, (c / k).sqrt(), (k / c).sqrt() / c)


def _copy_maps(copies: _Copies, out_axis: Axis, in_axis: Axis) -> dict[Axis, AxisMap]:
    """Producers are copied and consumers share the input among the copies."""
    index, c = copies.index, copies.count
    ones = torch.ones_like(c)
    return {out_axis: AxisMap(index, ones, 1 / c), in_axis: AxisMap(index, copies.live / c, ones)}


def _head_maps(
    source: ModelConfig, target: ModelConfig, base: int | None, normed_together: bool
) -> dict[Axis, AxisMap]:
    """Heads grow inside their key-value group, and whole groups are copied; the tiled order would mix groups."""
    group = source.num_heads // source.kv_heads
    new_group = target.num_heads // target.kv_heads
    kv, inside = _copies(source.kv_heads, target.kv_heads, base), _copies(group, new_group, base)
    head = torch.arange(target.num_heads)
    of_kv, of_group = head // new_group, head % new_group
    heads = _Copies(kv.index[of_kv] * group + inside.index[of_group], kv.live[of_kv] * inside.live[of_group])
    maps = _copy_maps(heads, Axis.HEADS_OUT, Axis.HEADS_IN)
    kv_map = AxisMap(kv.index, torch.ones_like(kv.count), 1 / kv.count)
    maps |= {Axis.KEY_HEADS_OUT: kv_map, Axis.VALUE_HEADS_OUT: kv_map}
    if normed_together:
        k, kv_k = target.num_heads / source.num_heads, target.kv_heads / source.kv_heads
        maps[Axis.HEADS_OUT], maps[Axis.QUERY_GAIN] = _normed_maps(heads, k, k)
        maps[Axis.KEY_HEADS_OUT], maps[Axis.KEY_GAIN] = _normed_maps(kv, kv_k, kv_k)
    return _per_channel(maps, source.head_size)


def _per_channel(maps: dict[Axis, AxisMap], head_size: int) -> dict[Axis, AxisMap]:
    channel = torch.arange(head_size)
    return {
        axis: AxisMap(
            (m.index[:, None] * head_size + channel).flatten(),
            m.weight.repeat_interleave(head_size),
            m.gradient.repeat_interleave(head_size),
        )
        for axis, m in maps.items()
    }

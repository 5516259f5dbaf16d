"""Widening: every parameter of a wider model from the parameters of a narrower one.

What each axis does is in maps.py. Here the maps meet the parameters, noise makes copies part, and `aki` takes new rows
from the next layer (Advanced Knowledge Initialization: bert2BERT, arXiv 2110.07143; AquilaMoE, arXiv 2408.06567).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modules.config import ModelConfig
from modules.errors import InputError
from modules.growth.maps import AxisMap, Map, MapRules, Scaling, along, axis_maps
from modules.growth.operation import Moments, ParameterSource, WarmUp, seeded_generator
from modules.growth.roles import IN_AXES, Axis, role_of
from modules.optim import ParameterFactors

WidthMethod = Literal["iso", "zero", "lemon", "fpi", "aki"]
Noise = Literal["projection", "pairs"]

_AKI_HIDDEN = {Axis.HIDDEN_OUT, Axis.EXPERT_HIDDEN_OUT, Axis.SHARED_HIDDEN_OUT, Axis.HEADS_OUT}
_AKI_ALL = _AKI_HIDDEN | {Axis.RESIDUAL_OUT, Axis.KEY_HEADS_OUT, Axis.VALUE_HEADS_OUT}
_CONSUMERS = {
    Axis.HIDDEN_IN: Axis.HIDDEN_OUT,
    Axis.EXPERT_HIDDEN_IN: Axis.EXPERT_HIDDEN_OUT,
    Axis.SHARED_HIDDEN_IN: Axis.SHARED_HIDDEN_OUT,
    Axis.HEADS_IN: Axis.HEADS_OUT,
}


@dataclass(frozen=True)
class WidthRules:
    """How a model is widened."""

    method: WidthMethod = "iso"
    """iso, zero and lemon keep the function for any ratio; fpi for whole ones; aki does not"""
    copies: Map = "even"
    """which source each new index copies"""
    split_noise: float = 0.0
    """relative noise on split inputs that adds up to zero"""
    noise: Noise = "projection"
    """noise over the copies of an input is drawn and centred, or + and - in pairs (HyperCloning, arXiv 2409.12903)"""
    aki_scope: Literal["all", "ffn_heads"] = "all"
    """aki: all output rows come from the next layer, or those of hidden neurons and heads"""
    aki_consumers: Literal["self", "next"] = "self"
    """aki: who reads new neurons and heads reads as in their own layer, or as in the next"""
    seed: int = 0

    @property
    def maps(self) -> MapRules:
        """How indices are chosen and scaled."""
        kind: Map = "zero" if self.method == "zero" else self.copies
        scaling: Scaling = "fpi" if self.method in ("fpi", "aki") else "iso"
        return MapRules(kind, scaling, self.seed)

    @property
    def relative_noise(self) -> float:
        """Of split inputs. LEMON draws them as large as the weights (a random projection, arXiv 2310.07999)."""
        return 1.0 if self.method == "lemon" else self.split_noise


@dataclass(frozen=True)
class Widen:
    """Grow dim, feed-forward width and heads of `source` to those of `config`; layers and experts stay."""

    source: ParameterSource
    config: ModelConfig
    rules: WidthRules = WidthRules()
    asymmetric: WarmUp | None = None

    def __post_init__(self) -> None:
        _check_widths(self.source.config, self.config)
        object.__setattr__(self, "_maps", axis_maps(self.source.config, self.config, self.rules.maps))

    @property
    def maps(self) -> Mapping[Axis, AxisMap]:
        """The map of each axis role that grows."""
        return self._maps  # type: ignore[attr-defined]

    @property
    def is_exact(self) -> bool:
        """Whether the wider model computes the same function, up to rounding."""
        if self.rules.maps.scaling == "iso":
            return True
        config, seen_by_norms = self.config, {Axis.RESIDUAL_OUT}
        if config.qk_norm and config.qk_norm_scope == "projection":
            seen_by_norms |= {Axis.HEADS_OUT, Axis.KEY_HEADS_OUT}
        keeps_norms = all(self.maps[role].is_uniform for role in seen_by_norms if role in self.maps)
        mixes_layers = any(self._takes_next(role) and _num_layers_with(role, config) > 1 for role in self.maps)
        return keeps_norms and not mixes_layers

    def weight(self, name: str) -> Tensor:
        """The grown parameter."""
        grown = self._with_next(name, self.source.weight, lambda axis_map: axis_map.weight)
        for axis, role in enumerate(role_of(name).axes):
            if role not in self.maps:
                continue
            if self.maps[role].draws and grown.ndim > 1:
                self._draw(grown, axis, self.maps[role], name)
            if self.rules.relative_noise and role in IN_AXES:
                grown += self._noise(grown, axis, self.maps[role], name)
        return grown

    def moments(self, name: str) -> Moments | None:
        """The optimizer's state, mapped so that the grown model takes the source's steps. It does exactly where all
        sources have equally many copies, and these the same readers: not where key-value heads are repeated for other
        query heads."""
        before = self.source.moments(name)
        if before is None:
            return None
        if self.asymmetric is not None:
            maps = {axis: self.maps[role] for axis, role in enumerate(role_of(name).axes) if role in self.maps}
            shape = tuple(len(maps[i].index) if i in maps else size for i, size in enumerate(before.first.shape))
            return self.asymmetric.extended(before, shape, {axis: m.firsts for axis, m in maps.items()})

        def read(part: str) -> Callable[[str], Tensor]:
            return lambda other: getattr(self.source.moments(other) or before, part)

        return before.mapped(
            lambda _: self._with_next(name, read("first"), lambda axis_map: axis_map.gradient),
            lambda _: self._with_next(name, read("second"), lambda axis_map: axis_map.gradient.square()),
        )

    def factors(self, name: str) -> ParameterFactors:
        """Learning rate follows the weight's scale, eps the gradient's, weight decay undoes the learning rate's."""
        if self.asymmetric is not None:
            return self.source.factors(name)
        scale, slope = 1.0, 1.0
        for role in role_of(name).axes:
            if role in self.maps:
                live = self.maps[role].live.bool()
                scale *= self.maps[role].weight[live].mean().item()
                slope *= self.maps[role].gradient[live].mean().item()
        follows = ParameterFactors(lr=scale, weight_decay=1 / scale, eps=slope, muon=self._muon_factor(name))
        return self.source.factors(name) * follows

    def _muon_factor(self, name: str) -> float:
        """Muon's steps have a size that goes by the shape. An orthogonal matrix whose rows and columns are copied is
        orthogonal again when divided by the root of the copies, which is what Muon makes of the copied momentum."""
        axes = role_of(name).axes
        copied = [(axis, self.maps[role]) for axis, role in enumerate(axes) if role in self.maps]
        if len(axes) < 2 or not copied:
            return 1.0
        before = list(self.source.weight(name).shape)
        after, copies = before.copy(), 1.0
        for axis, axis_map in copied:
            after[axis] = len(axis_map.index)
            copies *= axis_map.live.sum().item() / before[axis]
        return math.sqrt(copies * max(before[-2:]) / max(after[-2:]))

    def _with_next(self, name: str, read: Callable[[str], Tensor], factor: Callable[[AxisMap], Tensor]) -> Tensor:
        """The expanded tensor; under aki, with new rows (and columns) of the next layer's."""
        grown, following = self._expanded(name, read(name), factor), self._following(name)
        axes = [(axis, self.maps[role]) for axis, role in enumerate(role_of(name).axes) if self._takes_next(role)]
        if following is None or not axes:
            return grown
        other = self._expanded(following, read(following), factor)
        for axis, axis_map in axes:
            new = axis_map.new.to(grown.device)
            grown.index_copy_(axis, new, other.index_select(axis, new))
        return grown

    def _following(self, name: str) -> str | None:
        """The same parameter of the next layer that has it: routed and dense feed-forwards follow their own kind."""
        role, routed = role_of(name), self.config.routed_layers
        if role.layer is None:
            return None
        of_kind = role.part.startswith("feed_forward.")
        for layer in range(role.layer + 1, self.config.num_layers):
            if not of_kind or (layer in routed) == (role.layer in routed):
                return role.at_layer(layer)
        return None

    def _takes_next(self, role: Axis) -> bool:
        if self.rules.method != "aki" or role not in self.maps or not len(self.maps[role].new):
            return False
        scope = _AKI_ALL if self.rules.aki_scope == "all" else _AKI_HIDDEN
        return role in scope or (self.rules.aki_consumers == "next" and _CONSUMERS.get(role) in scope)

    def _expanded(self, name: str, tensor: Tensor, factor: Callable[[AxisMap], Tensor]) -> Tensor:
        for axis, role in enumerate(role_of(name).axes):
            if role in self.maps:
                tensor = self.maps[role].apply(tensor, axis, factor(self.maps[role]))
        return tensor

    def _draw(self, grown: Tensor, axis: int, axis_map: AxisMap, name: str) -> None:
        """What only fills the size up is drawn as large as the weights are, in place."""
        new = (axis_map.live == 0).nonzero()[:, 0].to(grown.device)
        if not len(new):
            return
        shape = [*grown.shape[:axis], len(new), *grown.shape[axis + 1 :]]
        generator = seeded_generator(self.rules.seed, "drawn", name, str(axis))
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32).to(grown) * grown.std()
        grown.index_copy_(axis, new, drawn)

    def _noise(self, grown: Tensor, axis: int, axis_map: AxisMap, name: str) -> Tensor:
        """Noise whose sum over the copies of each input is zero."""
        generator = seeded_generator(self.rules.seed, "split_noise", name)
        noise = torch.randn(grown.shape, generator=generator, dtype=torch.float32).to(grown)
        if self.rules.noise == "pairs":
            first, sign = axis_map.pairs
            noise = noise.index_select(axis, first.to(grown.device)).mul_(along(sign, axis, grown))
        else:  # matrices are large: each step is in place
            index, live = axis_map.index.to(grown.device), along(axis_map.live, axis, grown)
            counts = torch.bincount(axis_map.index, weights=axis_map.live)
            means = grown.new_zeros(*grown.shape[:axis], axis_map.num_source, *grown.shape[axis + 1 :])
            means.index_add_(axis, index, noise.mul_(live)).div_(along(counts, axis, grown))
            noise.sub_(means.index_select(axis, index)).mul_(live)
        return noise.mul_(self.rules.relative_noise * grown.std())


def _num_layers_with(role: Axis, config: ModelConfig) -> int:
    """Layers among which a next one is looked for: dense and routed feed-forwards follow their own kind."""
    if role in (Axis.HIDDEN_OUT, Axis.HIDDEN_IN):
        return config.num_layers - len(config.routed_layers)
    of_experts = {Axis.EXPERT_HIDDEN_OUT, Axis.EXPERT_HIDDEN_IN, Axis.SHARED_HIDDEN_OUT, Axis.SHARED_HIDDEN_IN}
    return len(config.routed_layers) if role in of_experts else config.num_layers


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

"""Deepening: new blocks that are copies of old ones.

`zero_block` (LLaMA-Pro, arXiv 2401.02415) keeps the function: the new blocks' output projections are zero, and get
gradient alone at the first step. With hybridnorm and postnorm the gain of the norm behind them is zero instead: a norm
of zeros has a slope of 1 / sqrt(eps). `stack` (arXiv 2405.15319) repeats the whole model, `interpolate` each block;
both change the function.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from modules.config import ModelConfig
from modules.errors import InputError
from modules.growth.operation import Moments, ParameterSource, WarmUp
from modules.growth.roles import Axis, role_of
from modules.optim import ParameterFactors

DepthMethod = Literal["zero_block", "stack", "interpolate"]


@dataclass(frozen=True)
class Deepen:
    """Grow the number of layers to `num_layers`.

    Args:
        new_layers: for zero_block, which of the deeper model's layers are new; spread evenly when left out. A new
            layer is a copy of the old one before it (the first one of the old one behind it).
    """

    source: ParameterSource
    num_layers: int
    method: DepthMethod = "zero_block"
    new_layers: tuple[int, ...] | None = None
    asymmetric: WarmUp | None = None

    def __post_init__(self) -> None:
        before, new = self.source.config.num_layers, self.new_layers
        if self.num_layers < before:
            raise InputError(
                f"growth target num_layers={self.num_layers} is smaller than its source's {before}; "
                f"choose num_layers >= {before}"
            )
        if new is None:
            return
        if self.method != "zero_block":
            raise InputError(f"new_layers={list(new)} with depth={self.method}: only zero_block has it; remove it")
        if len(set(new)) != self.num_layers - before or not set(new) <= set(range(self.num_layers)):
            raise InputError(
                f"new_layers={list(new)} must name {self.num_layers - before} different layers of 0.."
                f"{self.num_layers - 1}, those that num_layers={self.num_layers} adds to {before}; correct it"
            )

    @property
    def config(self) -> ModelConfig:
        """The deeper architecture; a copy of a routed layer is routed."""
        before = self.source.config
        if before.moe is None:
            return replace(before, num_layers=self.num_layers)
        routed = tuple(layer for layer, origin in enumerate(self.origins) if origin in before.routed_layers)
        return replace(before, num_layers=self.num_layers, moe=replace(before.moe, layers=routed))

    @property
    def is_exact(self) -> bool:
        """New blocks of `zero_block` write nothing at first."""
        return self.method == "zero_block"

    @property
    def origins(self) -> list[int]:
        """The source layer of each layer."""
        before = self.source.config.num_layers
        if self.method == "stack":
            return [layer % before for layer in range(self.num_layers)]
        if self.new_layers is None:
            return [layer * before // self.num_layers for layer in range(self.num_layers)]
        old_so_far = [sum(layer not in self.new_layers for layer in range(end + 1)) for end in range(self.num_layers)]
        return [max(0, count - 1) for count in old_so_far]

    def weight(self, name: str) -> Tensor:
        """The parameter of the block's original; zero for what would let a block of `zero_block` write."""
        weight = self.source.weight(self._origin(name))
        closing = Axis.RESIDUAL_OUT if self.config.norm_structure == "prenorm" else Axis.POST_GAIN
        is_closed = self.method == "zero_block" and self._is_new(name) and closing in role_of(name).axes
        return torch.zeros_like(weight) if is_closed else weight

    def moments(self, name: str) -> Moments | None:
        """The original's state; a new block of `zero_block`, which gets other gradients, starts with none."""
        before, is_new = self.source.moments(self._origin(name)), self._is_new(name)
        if is_new and self.asymmetric is not None and before is not None:
            return self.asymmetric.new(before)
        return None if is_new and self.method == "zero_block" else before

    def factors(self, name: str) -> ParameterFactors:
        """The original's factors."""
        return self.source.factors(self._origin(name))

    def _origin(self, name: str) -> str:
        role = role_of(name)
        return name if role.layer is None else role.at_layer(self.origins[role.layer])

    def _is_new(self, name: str) -> bool:
        layer = role_of(name).layer
        if layer is None:
            return False
        if self.new_layers is not None:
            return layer in self.new_layers
        return self.origins[layer] in self.origins[:layer]

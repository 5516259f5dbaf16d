"""Deepening by `zero_block`: copies of blocks whose output projections are zero, so that nothing changes at first.

The new blocks get gradient on their output projections only, at the first step (LLaMA-Pro, arXiv 2401.02415). With
hybridnorm and postnorm the gain of the norm behind them is zero instead: a norm of zeros has a slope of 1 / sqrt(eps).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modules.config import ModelConfig
from modules.errors import InputError
from modules.growth.operation import Moments, ParameterSource
from modules.growth.roles import Axis, role_of
from modules.optim import ParameterFactors


def source_layers(num_source: int, num_target: int) -> list[int]:
    """The source layer of each target layer: l takes l·source // target; copies stand behind their original."""
    return [layer * num_source // num_target for layer in range(num_target)]


def deepened_config(source: ModelConfig, num_layers: int) -> ModelConfig:
    """`source` with more layers; a copy of a routed layer is routed."""
    if source.moe is None:
        return replace(source, num_layers=num_layers)
    origin = source_layers(source.num_layers, num_layers)
    routed = tuple(layer for layer in range(num_layers) if origin[layer] in source.routed_layers)
    return replace(source, num_layers=num_layers, moe=replace(source.moe, layers=routed))


@dataclass(frozen=True)
class Deepen:
    """Grow the number of layers to `num_layers`."""

    source: ParameterSource
    num_layers: int

    def __post_init__(self) -> None:
        before = self.source.config.num_layers
        if self.num_layers < before:
            raise InputError(
                f"growth target num_layers={self.num_layers} is smaller than its source's {before}; "
                f"choose num_layers >= {before}"
            )

    @property
    def config(self) -> ModelConfig:
        """The deeper architecture."""
        return deepened_config(self.source.config, self.num_layers)

    def weight(self, name: str) -> Tensor:
        """The parameter of the block's original; zero for what would let a new block's branches write."""
        weight = self.source.weight(self._origin(name))
        closing = Axis.RESIDUAL_OUT if self.config.norm_structure == "prenorm" else Axis.POST_GAIN
        is_closed = self._is_new(name) and closing in role_of(name).axes
        return torch.zeros_like(weight) if is_closed else weight

    def moments(self, name: str) -> Moments | None:
        """The original's state; a new block starts with none."""
        return None if self._is_new(name) else self.source.moments(self._origin(name))

    def factors(self, name: str) -> ParameterFactors:
        """The original's factors."""
        return self.source.factors(self._origin(name))

    def _origin(self, name: str) -> str:
        role = role_of(name)
        return name if role.layer is None else role.at_layer(self._layers[role.layer])

    def _is_new(self, name: str) -> bool:
        layer = role_of(name).layer
        return layer is not None and layer > 0 and self._layers[layer] == self._layers[layer - 1]

    @property
    def _layers(self) -> list[int]:
        return source_layers(self.source.config.num_layers, self.num_layers)

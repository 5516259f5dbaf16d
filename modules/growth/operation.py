"""What a growth operation is: a lazy function from the parameters before to each parameter after.

Operations read through a callable, so that a chain of them (widen, then deepen, then upcycle) grows one parameter at a
time and never holds two whole models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from modules.config import ModelConfig
from modules.optim import ParameterFactors


@dataclass(frozen=True)
class Moments:
    """Adam's state of one parameter: first and second moment (shaped like it) and the number of its updates."""

    first: Tensor
    second: Tensor
    step: float


class ParameterSource(Protocol):
    """Parameters of one architecture, by name; `moments` is None where the optimizer has none."""

    @property
    def config(self) -> ModelConfig: ...

    def weight(self, name: str) -> Tensor: ...

    def moments(self, name: str) -> Moments | None: ...

    def factors(self, name: str) -> ParameterFactors: ...


class Operation(ParameterSource, Protocol):
    """Parameters that are grown from those of another source."""

    @property
    def is_exact(self) -> bool:
        """Whether the model computes the same function as before, up to rounding."""
        ...


@dataclass(frozen=True)
class TensorSource:
    """Parameters at hand: the start of a chain."""

    config: ModelConfig
    read_weight: Callable[[str], Tensor]
    read_moments: Callable[[str], Moments | None]
    read_factors: Callable[[str], ParameterFactors]

    def weight(self, name: str) -> Tensor:
        """The parameter."""
        return self.read_weight(name)

    def moments(self, name: str) -> Moments | None:
        """Adam's state of it."""
        return self.read_moments(name)

    def factors(self, name: str) -> ParameterFactors:
        """Its factors so far."""
        return self.read_factors(name)


def seeded_generator(seed: int, *labels: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the labels alone: the same draw inside a run and outside it."""
    text = "/".join((str(seed), *labels)).encode()
    state = 0xCBF29CE484222325  # FNV-1a, 64 bits
    for byte in text:
        state = ((state ^ byte) * 0x100000001B3) % 2**64
    return torch.Generator().manual_seed(state % 2**63)

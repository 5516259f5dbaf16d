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
from modules.grown_adamw import Birth
from modules.optim import ParameterFactors


@dataclass(frozen=True)
class Moments:
    """Adam's state of one parameter: first and second moment (shaped like it), the number of its updates, and which of
    its entries came later than the others."""

    first: Tensor
    second: Tensor
    step: float
    births: tuple[Birth, ...] = ()


@dataclass(frozen=True)
class WarmUp:
    """Asymmetric optimizer state (SPARKLING, arXiv 2602.02472): old entries keep their moments as they are and stay on
    the schedule; new ones start from zero, and their learning rate rises to `factor` times the schedule's within
    `steps` and returns within as many."""

    factor: float = 1.3
    steps: int = 250

    def extended(self, before: Moments, shape: tuple[int, ...]) -> Moments:
        """The state of a parameter whose first entries along every axis are those before."""
        if tuple(before.first.shape) == shape:
            return before
        old = tuple(slice(0, size) for size in before.first.shape)
        first, second = before.first.new_zeros(shape), before.second.new_zeros(shape)
        first[old], second[old] = before.first, before.second
        birth = {"old": list(before.first.shape), "step": before.step, "factor": self.factor, "steps": self.steps}
        return Moments(first, second, before.step, (*before.births, birth))

    def new(self, like: Moments) -> Moments:
        """The state of a parameter that is new altogether."""
        birth = {"old": [0] * like.first.ndim, "step": 0.0, "factor": self.factor, "steps": self.steps}
        return Moments(torch.zeros_like(like.first), torch.zeros_like(like.second), 0.0, (birth,))


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

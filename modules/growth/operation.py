"""What a growth operation is: a lazy function from the parameters before to each parameter after.

Operations read through a callable, so that a chain of them (widen, then deepen, then upcycle) grows one parameter at a
time and never holds two whole models.
"""

from collections.abc import Callable, Mapping
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

    def extended(self, before: Moments, shape: tuple[int, ...], places: Mapping[int, Tensor] | None = None) -> Moments:
        """The state of a larger parameter.

        Args:
            shape: its shape.
            places: by axis, where the entries before are; they are the first ones where it says nothing.
        """
        if tuple(before.first.shape) == shape:
            return before
        first, second, births = before.first, before.second, before.births
        old: list[int | list[int]] = list(before.first.shape)
        for axis, place in (places or {axis: torch.arange(size) for axis, size in enumerate(first.shape)}).items():
            larger = (*first.shape[:axis], shape[axis], *first.shape[axis + 1 :])
            first = first.new_zeros(larger).index_copy_(axis, place.to(first.device), first)
            second = second.new_zeros(larger).index_copy_(axis, place.to(second.device), second)
            if not torch.equal(place, torch.arange(len(place))):
                old[axis] = place.tolist()
                births = tuple(_moved(birth, axis, place) for birth in births)
        birth = {"old": old, "step": before.step, "factor": self.factor, "steps": self.steps}
        return Moments(first, second, before.step, (*births, birth))

    def new(self, like: Moments) -> Moments:
        """The state of a parameter that is new altogether."""
        birth = {"old": [0] * like.first.ndim, "step": 0.0, "factor": self.factor, "steps": self.steps}
        return Moments(torch.zeros_like(like.first), torch.zeros_like(like.second), 0.0, (birth,))


def _moved(birth: Birth, axis: int, place: Tensor) -> Birth:
    """A birth after the entries of one axis have moved to other places."""
    kept = birth["old"][axis]
    indices = torch.arange(kept) if isinstance(kept, int) else torch.tensor(kept)
    old = [*birth["old"][:axis], place[indices].tolist(), *birth["old"][axis + 1 :]]
    return {**birth, "old": old}


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

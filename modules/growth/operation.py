"""What a growth operation is: a lazy function from the parameters before to each parameter after.

Operations read through a callable, so that a chain of them (widen, then deepen, then upcycle) grows one parameter at a
time and never holds two whole models.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from modules.config import ModelConfig
from modules.grown_adamw import Birth
from modules.optim import ParameterFactors


@dataclass(frozen=True)
class Moments:
    """The optimizer's state of one parameter: Adam's first and second moment, or Muon's momentum as the first and none
    (shaped like it); the number of its updates; and which of its entries came later than the others."""

    first: Tensor
    second: Tensor | None
    step: float
    births: tuple[Birth, ...] = ()

    def mapped(self, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> "Moments":
        """The state of a grown parameter, of one age throughout, by a function for each moment."""
        return Moments(first(self.first), None if self.second is None else second(self.second), self.step)


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
        births, old = before.births, list[int | list[int]](before.first.shape)
        places = places or {axis: torch.arange(size) for axis, size in enumerate(before.first.shape)}
        for axis, place in places.items():
            if not torch.equal(place, torch.arange(len(place))):
                old[axis] = place.tolist()
                births = tuple(_moved(birth, axis, place) for birth in births)
        birth = {"old": old, "step": before.step, "factor": self.factor, "steps": self.steps}

        def spread(moment: Tensor) -> Tensor:
            for axis, place in places.items():
                room = moment.new_zeros(*moment.shape[:axis], shape[axis], *moment.shape[axis + 1 :])
                moment = room.index_copy_(axis, place.to(moment.device), moment)
            return moment

        return replace(before.mapped(spread, spread), births=(*births, birth))

    def new(self, like: Moments) -> Moments:
        """The state of a parameter that is new altogether."""
        birth = {"old": [0] * like.first.ndim, "step": 0.0, "factor": self.factor, "steps": self.steps}
        return replace(like.mapped(torch.zeros_like, torch.zeros_like), step=0.0, births=(birth,))


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
        """The optimizer's state of it."""
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

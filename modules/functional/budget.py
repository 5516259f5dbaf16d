"""What the steps of a run cost, and how many of them a budget buys."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Mode = Literal["step_time", "tokens", "flops", "own_chinchilla"]
"""What a budget is of: accelerator time, tokens, training FLOPs, or tokens for each of a model's own parameters."""
TOKENS_PER_PARAMETER = 20.0
"""of a compute-optimal dense model, by Chinchilla (arXiv 2203.15556)"""


@dataclass(frozen=True)
class StageCost:
    """The part of a run between two transitions.

    Attributes:
        flops: of a step.
        parameters: without embeddings, those that a token meets.
        seconds: of a step, where they are known.
        trigger: what makes it begin: at_step, at_tokens or at_fraction; empty for the first stage.
        transition: seconds that it takes to begin.
    """

    flops: float
    parameters: int
    seconds: float = math.nan
    trigger: Mapping[str, float] = field(default_factory=dict)
    transition: float = 0.0

    def begins(self, steps: int, tokens_per_step: int) -> int:
        """The step after which it does, in a run of so many steps; the run's end when that comes first."""
        return min(steps, due_step(self.trigger, steps, tokens_per_step) or 0)


@dataclass(frozen=True)
class RunCost:
    """What the steps of a run cost.

    Attributes:
        stages: in their order.
        tokens_per_step: on all devices.
        devices: how many train together.
    """

    stages: Sequence[StageCost]
    tokens_per_step: int
    devices: int = 1

    def lengths(self, steps: int) -> list[int]:
        """Steps of each stage in a run of so many."""
        begins = [stage.begins(steps, self.tokens_per_step) for stage in self.stages]
        return [max(0, end - begin) for begin, end in zip(begins, [*begins[1:], steps], strict=True)]

    def accelerator_seconds(self, steps: int) -> float:
        """Of all devices together, in steps and in the transitions between them."""
        parts = zip(self.stages, self.lengths(steps), strict=True)
        seconds = sum(length * stage.seconds + (stage.transition if length else 0.0) for stage, length in parts)
        return self.devices * seconds

    def flops(self, steps: int) -> float:
        """Of training, with the empty slots of a capacity."""
        return sum(length * stage.flops for stage, length in zip(self.stages, self.lengths(steps), strict=True))

    @property
    def step_seconds(self) -> float:
        """Of the model that the run ends with."""
        return self.stages[-1].seconds

    @property
    def parameters(self) -> int:
        """Of that model, without embeddings, those that a token meets."""
        return self.stages[-1].parameters


def due_step(trigger: Mapping[str, float], max_steps: float, tokens_per_step: int) -> int | None:
    """The step after which a stage is due in a run of so many steps; None where nothing but the run itself can tell."""
    if "at_fraction" in trigger:
        return math.ceil(trigger["at_fraction"] * max_steps)
    if "at_tokens" in trigger:
        return math.ceil(trigger["at_tokens"] / tokens_per_step)
    return int(trigger["at_step"]) if "at_step" in trigger else None


def most_steps(limit: float, cost: Callable[[int], float]) -> int:
    """The largest number of steps that costs no more than a limit; `cost` grows with them."""
    allowed = limit * (1 + 1e-12)
    beyond = 1
    while cost(beyond) <= allowed:
        beyond *= 2
    low = beyond // 2
    while beyond - low > 1:
        middle = (low + beyond) // 2
        low, beyond = (middle, beyond) if cost(middle) <= allowed else (low, middle)
    return low

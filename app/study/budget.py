"""Steps of every run: what the budget of an anchor buys another model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from app.study.design import Mode, StudyBudget
from modules.errors import InputError


@dataclass(frozen=True)
class StageCost:
    """A stage of an arm, as measured.

    Attributes:
        trigger: what makes it begin: one of at_step, at_tokens, at_fraction; empty for the first stage.
        seconds: of a step.
        flops: of a step.
        transition: seconds that it takes to begin.
        parameters: without embeddings, those that a token meets.
    """

    trigger: dict[str, float]
    seconds: float
    flops: float
    transition: float
    parameters: int

    def begins(self, steps: int, tokens_per_step: int) -> int:
        """The step after which it does, in a run of so many steps; the run's end when that comes first."""
        if "at_fraction" in self.trigger:
            due = math.ceil(self.trigger["at_fraction"] * steps)
        elif "at_tokens" in self.trigger:
            due = math.ceil(self.trigger["at_tokens"] / tokens_per_step)
        else:
            due = int(self.trigger.get("at_step", 0))
        return min(due, steps)


@dataclass(frozen=True)
class ArmCost:
    """What the steps of an arm cost."""

    stages: Sequence[StageCost]
    tokens_per_step: int
    devices: int

    @classmethod
    def of(cls, measurement: dict[str, Any]) -> "ArmCost":
        """From a record of `growmoe measure`.

        Raises:
            InputError: a stage that begins at a plateau: only the run can tell what it costs.
        """
        tokens, stages = measurement["tokens_per_step"], []
        for number, stage in enumerate(measurement["stages"]):
            if number and not stage["trigger"]:
                raise InputError(
                    f"growth stage {number} begins at a plateau, so that no budget can be worked out; give at_fraction"
                )
            stages.append(
                StageCost(
                    stage["trigger"] or {},
                    stage["step_s"],
                    stage["flops_per_token"] * tokens,
                    stage["transition_s"],
                    stage["parameters"]["active_non_embedding"],
                )
            )
        return cls(stages, tokens, measurement["machine"]["devices"])

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
        """Of the model that the arm ends with."""
        return self.stages[-1].seconds


def anchor_steps(anchor: ArmCost, size: str, budget: StudyBudget) -> int:
    """Steps of the anchor's run."""
    seconds = budget.seconds_of(size)
    if seconds is not None:
        return most_steps(seconds, anchor.accelerator_seconds)
    return round(budget.tokens_per_parameter * anchor.stages[-1].parameters / anchor.tokens_per_step)


def arm_steps(arm: ArmCost, anchor: ArmCost, size: str, mode: Mode, budget: StudyBudget) -> int:
    """Steps of an arm's run: the most that cost no more than the anchor's.

    Args:
        arm: may be the anchor itself.
        anchor: that of the size.
        size: its name.
        mode: what must not cost more.
    """
    if mode == "own_chinchilla":
        return round(budget.tokens_per_parameter * arm.stages[-1].parameters / arm.tokens_per_step)
    steps = anchor_steps(anchor, size, budget)
    if mode == "tokens":
        return steps * anchor.tokens_per_step // arm.tokens_per_step
    if mode == "flops":
        return most_steps(anchor.flops(steps), arm.flops)
    return most_steps(anchor.accelerator_seconds(steps), arm.accelerator_seconds)


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

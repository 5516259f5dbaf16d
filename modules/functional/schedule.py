"""Learning-rate schedules: pure functions from the step to a factor on the peak learning rate."""

import math
from dataclasses import dataclass
from typing import Literal

from modules.errors import InputError


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves over the run."""

    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    """warm-up-stable-decay (linear decay at the end), cosine, or constant after the warm-up"""
    warmup_steps: int = 100
    """steps of linear warm-up from 0"""
    decay_fraction: float = 0.2
    """share of the run's steps in the final linear decay (wsd)"""
    final_ratio: float = 0.1
    """learning rate at the last step, as a share of the peak (wsd, cosine)"""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise InputError(f"warmup_steps={self.warmup_steps} must be at least 0; use 0 for no warm-up")
        for name in ("decay_fraction", "final_ratio"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise InputError(f"{name}={value} must lie between 0 and 1; give a share")

    def check_total(self, total_steps: int) -> None:
        """Raise `InputError` when the warm-up does not fit into the run."""
        if self.warmup_steps >= total_steps:
            raise InputError(
                f"warmup_steps={self.warmup_steps} is not below the run's {total_steps} steps; "
                "shorten the warm-up or raise trainer.max_steps"
            )


@dataclass(frozen=True)
class Pace:
    """How a run goes through its schedule: step by step, or faster where a budget lets it take fewer steps.

    After `step` steps, `position` of the schedule's `total` were behind it; the others are spread evenly over the steps
    up to `end`. So the run ends where its schedule ends, wherever that is, and the learning rate never jumps.
    """

    total: int
    step: int = 0
    position: float = 0.0
    end: int | None = None
    """steps of the run; empty: all of the schedule's"""

    @property
    def last_step(self) -> int:
        """Steps of the run."""
        return self.total if self.end is None else self.end

    def at(self, step: int) -> float:
        """Where the schedule is after so many steps."""
        if self.end is None:
            return step
        done = (step - self.step) / max(1, self.end - self.step)
        return self.position + (self.total - self.position) * min(1.0, done)

    def cut(self, step: int, end: int) -> "Pace":
        """The same from here on, so that the run ends after `end` steps."""
        return Pace(self.total, step, self.at(step), end)


def learning_rate_factor(step: int, pace: Pace, config: ScheduleConfig) -> float:
    """The factor on the peak learning rate for the update that follows `step` finished updates.

    The warm-up counts steps; what comes behind it follows the position in the schedule.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.kind == "constant":
        return 1.0
    if config.kind == "cosine":
        return _cosine(pace.at(step), config.warmup_steps, pace.total, config.final_ratio)
    return _linear_tail(pace.at(step), pace.total, config)


def _cosine(position: float, start: int, end: int, final: float) -> float:
    progress = min(1.0, (position - start) / max(1, end - start))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def _linear_tail(position: float, total_steps: int, config: ScheduleConfig) -> float:
    decay_steps = round(config.decay_fraction * total_steps)
    start = max(config.warmup_steps, total_steps - decay_steps)
    if position < start:
        return 1.0
    progress = min(1.0, (position - start) / max(1, total_steps - start))
    return 1 - (1 - config.final_ratio) * progress

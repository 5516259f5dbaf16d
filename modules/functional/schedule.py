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


def learning_rate_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """The factor on the peak learning rate for the update that follows `step` finished updates."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.kind == "constant":
        return 1.0
    if config.kind == "cosine":
        return _cosine(step, config.warmup_steps, total_steps, config.final_ratio)
    return _linear_tail(step, total_steps, config)


def _cosine(step: int, start: int, end: int, final: float) -> float:
    progress = min(1.0, (step - start) / max(1, end - start))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def _linear_tail(step: int, total_steps: int, config: ScheduleConfig) -> float:
    decay_steps = round(config.decay_fraction * total_steps)
    start = max(config.warmup_steps, total_steps - decay_steps)
    if step < start:
        return 1.0
    progress = min(1.0, (step - start) / max(1, total_steps - start))
    return 1 - (1 - config.final_ratio) * progress

"""A run's length from a budget: of tokens, of FLOPs, by the model's size, or of accelerator time."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import astuple
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl

from callbacks.cadence import finished_step, is_log_step, tokens_seen
from callbacks.growth import Growth
from callbacks.step_clock import clock_of
from callbacks.warning import warn
from modules.config import ModelConfig
from modules.errors import InputError, require_positive
from modules.functional.budget import TOKENS_PER_PARAMETER, Mode, RunCost, StageCost, most_steps
from modules.functional.flops import count_parameters, training_flops_per_token
from modules.functional.schedule import Pace
from modules.growth.stage import GrowthStage
from modules.language_model import LanguageModel, log_metrics

LEAST_MEASURED = 5
"""steps whose median is believed"""
EARLY = (5, 10, 20)
"""steps at which time is looked at, however seldom steps are logged"""


class Budget(pl.Callback):
    """Gives a run as many steps as a budget buys; its schedule decays over them.

    Tokens, FLOPs and sizes are worked out before the run. Accelerator time is watched: where `trainer.max_steps` would
    take longer, the rest of the schedule is gone through in fewer steps, so that the run still ends on its decay.

    Args:
        mode: what the amount is: tokens to train on; flops of training; own_chinchilla, tokens for each parameter of
            the model that the run ends with (active, without embeddings); or step_time, accelerator-seconds, which
            are seconds of steps and transitions times devices.
        amount: how much; 20 for own_chinchilla when left out.
    """

    def __init__(
        self,
        mode: Mode | None = None,
        amount: float | None = None,
    ) -> None:
        if (mode is None) != (amount is None) and mode != "own_chinchilla":
            raise InputError(f"budget.mode={mode} with budget.amount={amount}; give both, or neither")
        if amount is not None:
            require_positive(**{"budget.amount": float(amount)})
        self.mode, self.amount = mode, float(amount or TOKENS_PER_PARAMETER)
        self.growth: Growth | None = None
        self._flops: list[float] = []
        self._saved: list[Any] | None = None
        self._warned: set[str] = set()

    def steps(self, max_steps: int, cost: RunCost) -> int:
        """The run's length, of any mode but step_time.

        Args:
            max_steps: the trainer's; -1 where it has none.
            cost: of the run's steps, in FLOPs.

        Raises:
            InputError: a length that is given twice, or not at all; a budget of less than a step.
        """
        if max_steps != -1:
            raise InputError(
                f"trainer.max_steps={max_steps} and budget.mode={self.mode} both say how long the run is; "
                "set trainer.max_steps to -1, or leave budget out"
            )
        if self.mode == "flops":
            steps = most_steps(self.amount, cost.flops)
        else:
            tokens = self.amount * (cost.parameters if self.mode == "own_chinchilla" else 1)
            steps = int(tokens // cost.tokens_per_step)
        if steps < 1:
            raise InputError(f"budget.amount={self.amount:g} of {self.mode} buys no step; raise it")
        return steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """A run that was cut before goes on at its pace, unless another length is now asked for.

        Raises:
            InputError: it has come to its end, and a larger budget cannot give it a longer schedule.
        """
        total = trainer.max_steps
        if self.mode != "step_time" or self._saved is None or self._saved[1] != total:
            return
        amount, *values = self._saved
        pace = Pace(*values)
        if trainer.global_step >= pace.last_step and self.amount > amount:
            raise InputError(
                f"budget.amount={self.amount:g} cannot prolong a run that ended on its decay after {pace.last_step} "
                f"steps within {amount:g}; continue an earlier one, or start a longer run"
            )
        pl_module.set_pace(pace)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At logged steps, and at some early ones, see whether the rest fits into what is left of the time."""
        step, pace, steps = trainer.global_step, pl_module.pace, clock_of(trainer).steps
        is_time = is_log_step(trainer) or (step in EARLY and finished_step(trainer))
        if self.mode != "step_time" or not is_time or len(steps) < LEAST_MEASURED or step >= pace.last_step:
            return
        microseconds = pl_module.world.largest(round(1e6 * clock_of(trainer).seconds))
        per_step = pl_module.world.largest(round(1e6 * statistics.median(steps))) * self._later(trainer, pl_module)
        left = math.floor((1e6 * self.amount / trainer.world_size - microseconds) / per_step)
        most = math.ceil(pace.total - pace.at(step))
        end = step + max(1, min(left, most))
        if end != pace.last_step:
            pace = pace.cut(step, end)
            pl_module.set_pace(pace)
            self._saved = [self.amount, *astuple(pace)]
            self._warn_of_the_end(trainer, pl_module)
        log_metrics(trainer, {"budget/last_step": end})

    def _warn_of_the_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Tell, once each, what a run that is cut will not come to."""
        pace, warmup = pl_module.pace, pl_module.schedule_config.warmup_steps
        lost = [f"the end of the warm-up (step {warmup})"] if pace.last_step <= warmup else []
        for stage in [] if self.growth is None else self.growth.stages[pl_module.stage :]:
            if stage.at_fraction is None and self._position(stage, trainer, pace) >= pace.total:
                lost.append(f"the growth stage {stage.trigger}")
        for what in lost:
            if what not in self._warned:
                self._warned.add(what)
                warn(
                    f"budget.amount={self.amount:g} ends the run at step {pace.last_step}, before {what}; raise it, or "
                    "let growth be due at_fraction, and shorten the warm-up"
                )

    def _later(self, trainer: pl.Trainer, pl_module: LanguageModel) -> float:
        """Mean FLOPs of a step to come over those of a step now: later stages take longer."""
        pace, stages = pl_module.pace, [] if self.growth is None else self.growth.stages[pl_module.stage :]
        now = pace.at(trainer.global_step)
        begins = [min(max(now, self._position(stage, trainer, pace)), pace.total) for stage in stages]
        shares = [later - earlier for earlier, later in pairwise([now, *begins, float(pace.total)])]
        flops = self._flops[pl_module.stage :]
        return sum(share * of_step for share, of_step in zip(shares, flops, strict=True)) / sum(shares) / flops[0]

    def _position(self, stage: GrowthStage, trainer: pl.Trainer, pace: Pace) -> float:
        """Of the schedule at which a stage begins; 0, which is now, where it waits for a plateau."""
        due = stage.due_step(tokens_seen(trainer) // trainer.global_step, pace.total)
        return 0.0 if due is None else due if stage.at_fraction is not None else pace.at(due)

    def expect(self, growth: Growth, architectures: Sequence[ModelConfig], seq_len: int) -> None:
        """Know the stages of the run."""
        self.growth = growth
        self._flops = [training_flops_per_token(config, seq_len) for config in architectures]

    def state_dict(self) -> dict[str, Any]:
        """The pace of a run that was cut."""
        return {"pace": self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at it."""
        self._saved = state_dict["pace"]


def run_cost(
    architectures: Sequence[ModelConfig], recipe: Sequence[GrowthStage], tokens_per_step: int, seq_len: int
) -> RunCost:
    """What the steps of a run cost in FLOPs.

    Raises:
        InputError: a stage that waits for a plateau: what it costs is not known before.
    """
    waiting = next((number for number, stage in enumerate(recipe, start=1) if stage.at_plateau is not None), None)
    if waiting is not None:
        raise InputError(
            f"growth stage {waiting} waits for a plateau, so that nobody knows what its budget buys; give at_fraction"
        )
    stages = [
        StageCost(
            flops=training_flops_per_token(config, seq_len) * tokens_per_step,
            parameters=count_parameters(config).active_non_embedding,
            trigger=when,
        )
        for config, when in zip(architectures, [{}, *(stage.when for stage in recipe)], strict=True)
    ]
    return RunCost(stages, tokens_per_step)

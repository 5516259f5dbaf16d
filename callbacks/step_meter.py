"""Step times of every stage of a run: some steps to warm up, some that are timed, some that are taken apart."""

import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from callbacks.cadence import finished_step, starts_step
from callbacks.step_parts import REST, PartClock, can_be_watched, now, watched
from callbacks.throughput import peak_memory
from modules.config import ModelConfig
from modules.errors import require_not_negative, require_positive
from modules.language_model import LanguageModel
from modules.world import ONE_PROCESS


@dataclass(frozen=True)
class StageTimes:
    """What a step of one architecture takes.

    Attributes:
        steps: seconds of each timed step, from the end of the one before to its own.
        waits: seconds of these in which no micro-batch was under way: input, and its way to the device.
        parts: seconds of a median step by part, input among them; empty where blocks are compiled.
        peak_bytes: of a GPU in this stage, or of a process on a CPU since it began; the largest of all processes.
        transition: seconds that it took to get here from the stage before.
    """

    architecture: ModelConfig
    steps: list[float]
    waits: list[float]
    parts: dict[str, float]
    peak_bytes: int
    transition: float

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.steps)


class StepMeter(pl.Callback):
    """Times the steps of each stage, and ends the run behind the last one.

    Args:
        warmup: steps of each stage that are not timed: compilation, memory, caches.
        steps: that are timed.
        parts: steps behind them whose parts are clocked.
    """

    def __init__(self, warmup: int = 5, steps: int = 20, parts: int = 3) -> None:
        require_positive(**{"measure.steps": steps})
        require_not_negative(**{"measure.warmup": warmup, "measure.parts": parts})
        self.warmup, self.num_timed, self.num_parted = warmup, steps, parts
        self.num_stages = 1
        self.stages: list[StageTimes] = []
        self._steps: list[float] = []
        self._waits: list[float] = []
        self._clock: PartClock | None = None
        self._watching = ExitStack()
        self._ended = self._waited = 0.0
        self._clear()

    @property
    def steps_per_stage(self) -> int:
        """Of any kind."""
        return self.warmup + self.num_timed + self.num_parted

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """The first step has begun."""
        self._ended = now(pl_module.device)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: LanguageModel, batch: Any, batch_idx: int) -> None:
        """Note how long was waited; take the step apart when it is one of these."""
        moment = now(pl_module.device)
        self._waited += moment - self._idle_since if self._idle_since else 0.0
        if self._done == 0 and pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        is_parted = starts_step(trainer, batch_idx) and self._done == self.warmup + self.num_timed
        if is_parted and self.num_parted and pl_module.network is not None and can_be_watched(pl_module.network):
            self._clock = PartClock(pl_module.device)
            self._watching.enter_context(watched(pl_module.network, self._clock, pl_module.world is ONE_PROCESS))
        if self._clock is not None:
            self._clock.start()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: LanguageModel, optimizer: Any) -> None:
        """Gradients are there: clipping and the update follow."""
        if self._clock is not None:
            self._clock.switch("optimizer")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the step's time; behind the last step of a stage, put its figures together."""
        self._idle_since = now(pl_module.device)
        if self._clock is not None:
            self._clock.switch(REST)
        if not finished_step(trainer):
            return
        if self.warmup <= self._done < self.warmup + self.num_timed:
            self._steps.append(self._idle_since - self._ended)
            self._waits.append(self._waited)
        self._ended, self._waited = self._idle_since, 0.0
        self._done += 1
        if self._done == self.steps_per_stage:
            self._watching.close()
            self.stages.append(self._collect(pl_module))
            self._clear()
            trainer.should_stop = len(self.stages) == self.num_stages

    def on_transition(self, trainer: pl.Trainer, pl_module: LanguageModel, record: dict[str, Any]) -> None:
        """Note what it took."""
        self._transition = record["seconds"]

    def _clear(self) -> None:
        """A stage begins."""
        self._done, self._waited, self._idle_since, self._transition = 0, 0.0, 0.0, 0.0
        self._steps, self._waits, self._clock = [], [], None

    def _collect(self, pl_module: LanguageModel) -> StageTimes:
        parts = {} if self._clock is None else self._clock.seconds
        wait = statistics.median(self._waits)
        scale = (statistics.median(self._steps) - wait) / sum(parts.values()) if parts else 0.0
        shown = {"input": wait, **{part: seconds * scale for part, seconds in parts.items()}} if parts else {}
        peak = pl_module.world.largest(peak_memory(pl_module.device))
        return StageTimes(pl_module.architecture, self._steps, self._waits, shown, peak, self._transition)

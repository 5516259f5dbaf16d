"""How long steps take: the accelerator time of a run, without what is done between steps."""

import time
from collections import deque
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from callbacks.cadence import finished_step
from modules.language_model import LanguageModel

WINDOW = 10
"""steps that are remembered, at least"""


class StepClock(pl.Callback):
    """Times every step: waiting for input, forward, backward, update, and transitions; validation, evaluation and
    checkpoints are left out. It comes before all other callbacks, and its `last` behind them.

    Times are taken on the host and never wait for the device, whose work they follow from one logged step to the next.

    Attributes:
        seconds: of all steps so far, also before the checkpoint that the run continues from.
        steps: seconds of the latest steps of the present network.
        waits: of these, what went by before a micro-batch was there.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps: deque[float] = deque(maxlen=WINDOW)
        self.waits: deque[float] = deque(maxlen=WINDOW)
        self.last = _Behind(self)
        self._opened: float | None = None
        self._step = self._wait = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Remember as many steps as lie between two that are logged."""
        window = max(WINDOW, trainer.log_every_n_steps)
        self.steps, self.waits = deque(maxlen=window), deque(maxlen=window)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: LanguageModel, batch: Any, batch_idx: int) -> None:
        """Input is there."""
        if self._opened is not None:
            self._wait += time.perf_counter() - self._opened

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A micro-batch is done, and perhaps a step."""
        self._close()
        if finished_step(trainer):
            self.steps.append(self._step)
            self.waits.append(self._wait)
            self._step = self._wait = 0.0

    def before_transition(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Checkpoints and evaluations beside the transition do not count."""
        self._close()

    def on_transition(self, trainer: pl.Trainer, pl_module: LanguageModel, record: dict[str, Any]) -> None:
        """The transition itself does; the steps of the network before are forgotten."""
        self.seconds += record["seconds"]
        self.steps.clear()
        self.waits.clear()

    def state_dict(self) -> dict[str, Any]:
        """The seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.seconds = state_dict["seconds"]

    def open(self) -> None:
        """From here on time counts."""
        self._opened = time.perf_counter()

    def _close(self) -> None:
        if self._opened is not None:
            passed = time.perf_counter() - self._opened
            self.seconds += passed
            self._step += passed
        self._opened = None


class _Behind(Checkpoint):
    """The last callback: when all others have done what they do between steps, time counts again.

    Lightning puts all of this class behind the others, in the order in which they are given.
    """

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """The first step."""
        self._clock.open()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The next one."""
        self._clock.open()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """A validation came between."""
        self._clock.open()

    def on_transition(self, trainer: pl.Trainer, pl_module: LanguageModel, record: dict[str, Any]) -> None:
        """The batch at hand is the grown network's first."""
        self._clock.open()


def clock_of(trainer: pl.Trainer) -> StepClock:
    """The clock among the trainer's callbacks."""
    return next(callback for callback in trainer.callbacks if isinstance(callback, StepClock))

"""Stopping on a signal: finish the step, save, leave."""

import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from callbacks.cadence import finished_step
from modules.language_model import LanguageModel

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(pl.Callback):
    """The first SIGINT or SIGTERM stops the run behind the step, with a checkpoint; a second one ends it at once.

    Attributes:
        received: the signal's number, None when there was none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Take the signals over; the handler only sets a flag."""
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask the trainer to stop; the checkpoint callback, which comes later, saves first.

        Of several processes all stop behind the same step, whichever was told to.
        """
        if not finished_step(trainer):
            return
        if trainer.world_size > 1:
            heard = torch.tensor(self.received or 0, device=pl_module.device)
            self.received = int(trainer.strategy.reduce(heard, reduce_op="max")) or None
        if self.received is not None:
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # Lightning would validate before it stops, and a grace period is short

    def on_train_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: LanguageModel, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

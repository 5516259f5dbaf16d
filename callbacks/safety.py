"""Stopping on a signal: finish the step, save, leave."""

import signal
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from callbacks.cadence import finished_step
from modules.language_model import LanguageModel

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopOnSignal(pl.Callback):
    """The first SIGINT or SIGTERM stops the run behind the step, with a checkpoint; a second one ends it at once.

    SIGUSR1, by which Slurm can announce the end of a job's time, counts as SIGTERM. A validation that is under way is
    given up, without figures: a grace period is short.

    Attributes:
        received: the signal's number, None when there was none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: LanguageModel, stage: str) -> None:
        """Take the signals over; the handler only sets a flag.

        Lightning's own handlers stay out: that of SIGTERM runs a collective, in which a process that was not told does
        not take part, and that of SIGUSR1 requeues Slurm's job. Its question of every batch whether one of them was
        called goes with them.
        """
        trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]
        if (
            threading.current_thread() is threading.main_thread()
        ):  # Ray trains in another one, and Python has no other way
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask the trainer to stop; the checkpoint callback, which comes later, saves first."""
        if finished_step(trainer) and self._is_told(trainer, pl_module):
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # Lightning would validate before it stops

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: LanguageModel, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Leave the validation: the next step stops the run, as it would without one.

        What was measured so far is of a part of the samples. Lightning and our callbacks take it for a sanity check,
        and log nothing of it.
        """
        if self._is_told(trainer, pl_module):
            trainer.sanity_checking = True
            raise StopIteration  # ends the loop over batches

    def teardown(self, trainer: pl.Trainer, pl_module: LanguageModel, stage: str) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: LanguageModel, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore()

    def _is_told(self, trainer: pl.Trainer, pl_module: LanguageModel) -> bool:
        """Whether any process was told to stop: all of them hear of it at the same batch.

        A signal that comes while they ask each other is heard of the next time: others do not know of it yet.
        """
        if trainer.world_size == 1:
            return self.received is not None
        heard = torch.tensor(self.received or 0, device=pl_module.device)
        dist.all_reduce(heard, dist.ReduceOp.MAX)
        number = int(heard)
        self.received = number or self.received
        return number > 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.SIGTERM if number == signal.SIGUSR1 else number
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def _nothing() -> None:
    """In the place of what Lightning does about signals."""

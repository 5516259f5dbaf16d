"""The last step of a run is validated, whatever the interval."""

from typing import Any

import lightning.pytorch as pl

from callbacks.cadence import finished_step
from modules.language_model import LanguageModel


class FinalValidation(pl.Callback):
    """Makes validation due behind the last step, so that no run ends without bits per byte."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning validates where the number of batches is a multiple of `val_check_batch`."""
        if finished_step(trainer) and trainer.global_step == trainer.max_steps:
            trainer.val_check_batch = batch_idx + 1

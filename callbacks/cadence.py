"""When callbacks act: between optimizer steps, never in the middle of gradient accumulation; and who hears of it."""

from typing import Any

import lightning.pytorch as pl


def finished_step(trainer: pl.Trainer) -> bool:
    """True in `on_train_batch_end` when this micro-batch completed an optimizer step."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def starts_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """True in `on_train_batch_start` when this micro-batch is the first of an optimizer step."""
    return batch_idx % trainer.accumulate_grad_batches == 0


def is_log_step(trainer: pl.Trainer) -> bool:
    """True in `on_train_batch_end` when the finished step is one whose figures are logged."""
    return finished_step(trainer) and trainer.global_step % trainer.log_every_n_steps == 0


def tokens_seen(trainer: pl.Trainer) -> int:
    """Training tokens (targets) of all finished micro-batches, over all ranks."""
    return trainer.datamodule.consumed_samples * trainer.datamodule.seq_len


def observers(trainer: pl.Trainer, method: str) -> list[Any]:
    """The callbacks with a hook of our own, such as `on_transition` or `on_evaluation`, in their order."""
    return [callback for callback in trainer.callbacks if hasattr(callback, method)]

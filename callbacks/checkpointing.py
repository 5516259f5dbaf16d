"""When checkpoints are written, and which are kept."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from callbacks.cadence import finished_step
from modules.config import MANIFEST
from modules.errors import InputError, require_positive
from modules.language_model import LanguageModel

BEST = "best"
"""the link to the best checkpoint, where a metric decides about it"""


@runtime_checkable
class SavesInBackground(Protocol):
    """A strategy that writes checkpoints while training goes on."""

    is_saving: bool

    def finish_saving(self) -> None:
        """Wait until the checkpoint that is being written is complete; raises where it could not be."""
        ...


class Checkpointing(Checkpoint):
    """Saves `checkpoints/step-NNNNNNNN` regularly, at the end, at a signal to stop, and on both sides of a transition.

    Args:
        every_n_steps: optimizer steps between two checkpoints.
        keep_last: regular checkpoints to keep, at least 2; those at transitions (`-stage-K`) stay for good, and the
            best one until there is a better one (see `Monitor`).
    """

    def __init__(self, every_n_steps: int = 500, keep_last: int = 3) -> None:
        require_positive(**{"checkpoint.every_n_steps": every_n_steps})
        if keep_last < 2:
            raise InputError(f"checkpoint.keep_last={keep_last} must be at least 2: the newest may prove to be damaged")
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self._kept: list[str] = []
        self._best: str | None = None
        self._begun: str | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Save the start of a fresh run, so that there is always something to continue from."""
        if trainer.global_step == 0:
            self._save_regular(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time, or when this is the last step."""
        step = trainer.global_step
        last = step == trainer.max_steps or trainer.should_stop
        if finished_step(trainer) and (last or step % self.every_n_steps == 0):
            self._save_regular(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Wait for a checkpoint that is still being written."""
        if isinstance(trainer.strategy, SavesInBackground):
            trainer.strategy.finish_saving()
            self._prune(trainer)

    def before_transition(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Keep the last state of the smaller model for good."""
        self._save_boundary(trainer, pl_module.stage)

    def on_transition(self, trainer: pl.Trainer, pl_module: LanguageModel, record: dict[str, Any]) -> None:
        """Keep the first state of the grown model for good."""
        self._save_boundary(trainer, pl_module.stage)

    def save_now(self, trainer: pl.Trainer) -> None:
        """Save the present state, between two steps, unless it is there already."""
        self._save_regular(trainer)

    def keep_best(self, trainer: pl.Trainer, name: str, is_saved_anyway: bool = False) -> None:
        """Save the present state, and keep it as `best` until another one is; the former may then be pruned.

        Args:
            trainer: between two steps.
            name: of the present state's checkpoint.
            is_saved_anyway: as at a transition, where it is kept for good.
        """
        former, self._best = self._best, name
        if not is_saved_anyway:
            self._save_regular(trainer)
            if isinstance(trainer.strategy, SavesInBackground):
                trainer.strategy.finish_saving()  # only then may the former go
        self.set_best(trainer, name)
        if former is not None and "-stage-" not in former and former not in self._kept:
            self._kept.insert(0, former)
            self._prune(trainer)

    def set_best(self, trainer: pl.Trainer, name: str | None) -> None:
        """Let `best` name the best checkpoint, or nothing."""
        self._best = name
        link = _folder(trainer) / BEST
        if not trainer.is_global_zero:
            return
        if name is None:
            link.unlink(missing_ok=True)
            return
        aside = link.with_name(f"{BEST}.tmp")
        aside.unlink(missing_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        aside.symlink_to(name)
        os.replace(aside, link)

    def state_dict(self) -> dict[str, Any]:
        """The names of the regular checkpoints, oldest first, that may be pruned."""
        return {"kept": list(self._kept)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue pruning where the run stopped."""
        self._kept = list(state_dict["kept"])

    def _save_regular(self, trainer: pl.Trainer) -> None:
        """Save, and delete the oldest regular checkpoints once the new one is complete.

        The name is noted first: a checkpoint knows of itself, and a run that continues from it may prune it.
        """
        name = _step_name(trainer)
        self._kept = [*(kept for kept in self._kept if kept != name), name]
        self._save(trainer, name)
        self._prune(trainer)

    def _save_boundary(self, trainer: pl.Trainer, stage: int) -> None:
        with _as_at_batch_end(trainer):
            self._save(trainer, f"{_step_name(trainer)}-stage-{stage}")

    def _save(self, trainer: pl.Trainer, name: str) -> Path:
        path = _folder(trainer) / name
        if trainer.is_global_zero and path.exists() and not (path / MANIFEST).exists():
            trainer.strategy.checkpoint_io.remove_checkpoint(path)  # the rest of one whose deletion was interrupted
        is_begun = name == self._begun  # and may still be written in the background
        if not is_begun and not trainer.strategy.broadcast(path.exists()):  # a resumed run has its very state there
            trainer.save_checkpoint(path)
        self._begun = name
        return path

    def _prune(self, trainer: pl.Trainer) -> None:
        """A checkpoint that is still being written does not count yet."""
        is_saving = isinstance(trainer.strategy, SavesInBackground) and trainer.strategy.is_saving
        while len(self._kept) > self.keep_last + is_saving:
            path = _folder(trainer) / self._kept.pop(0)
            if (
                path.name != self._best and path.exists()
            ):  # a run that continues another run's checkpoint has none of its files
                trainer.strategy.remove_checkpoint(path)


def is_complete(trainer: pl.Trainer, name: str) -> bool:
    """Whether a checkpoint of the run is there."""
    return (_folder(trainer) / name / MANIFEST).is_file()


def _step_name(trainer: pl.Trainer) -> str:
    return f"step-{trainer.global_step:08d}"


def _folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints"


@contextmanager
def _as_at_batch_end(trainer: pl.Trainer) -> Iterator[None]:
    """Lend Lightning's counters the state that they had when the last batch ended.

    A transition happens when the next batch has been fetched; saved like that, a resumed run would count it as begun.
    """
    loop = trainer.fit_loop.epoch_loop
    progress = (loop.batch_progress.current, loop.batch_progress.total)
    for counter in progress:
        counter.ready -= 1
        counter.completed -= 1
    loop._batches_that_stepped -= 1
    try:
        yield
    finally:
        loop._batches_that_stepped += 1
        for counter in progress:
            counter.ready += 1
            counter.completed += 1

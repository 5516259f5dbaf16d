"""One metric that decides which checkpoint is the best one and, if asked to, when a run has seen enough."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from callbacks.checkpointing import Checkpointing
from modules.errors import InputError, require_not_negative
from modules.language_model import LanguageModel


class Monitor(pl.Callback):
    """Keeps the checkpoint with the best value of a metric as `checkpoints/best`, and stops a run that has ceased to
    improve.

    Values are compared whenever they are measured: `eval/<task>` by an evaluation, `val/...` by a validation. A run
    that is stopped before its last step ends without the decay of its learning rate.

    Args:
        metric: such as eval/arc_easy or val/bpb_en; nothing is watched when left out.
        mode: which values are better; auto takes max for `eval/`, min for `val/`.
        patience: stop when so many values in a row were no better than the best; never when left out.
        min_delta: by how much a value must be better to count.
    """

    def __init__(
        self,
        metric: str | None = None,
        mode: Literal["auto", "max", "min"] = "auto",
        patience: int | None = None,
        min_delta: float = 0.0,
    ) -> None:
        if metric is None and patience is not None:
            raise InputError(f"monitor.patience={patience} has no metric to watch; set monitor.metric, or leave it out")
        if patience is not None and patience < 1:
            raise InputError(f"monitor.patience={patience} must be at least 1 value; leave it out to never stop")
        require_not_negative(**{"monitor.min_delta": min_delta})
        self.metric = metric
        self.mode = mode if mode != "auto" else "min" if metric is not None and metric.startswith("val/") else "max"
        self.patience = patience
        self.min_delta = min_delta
        self.best: float | None = None
        self.num_worse = 0

    def check(self, known: Collection[str]) -> None:
        """Raise `InputError` for a metric that the run is not going to measure."""
        if self.metric is not None and self.metric not in known:
            near = get_close_matches(self.metric, sorted(known), n=1)
            hint = f"did you mean {near[0]}?" if near else f"it measures {', '.join(sorted(known)) or 'none'}"
            raise InputError(f"monitor.metric={self.metric} is not measured in this run; {hint}")

    def on_evaluation(
        self,
        trainer: pl.Trainer,
        pl_module: LanguageModel,
        metrics: Mapping[str, float],
        transition: Mapping[str, Any] | None,
    ) -> None:
        """Look at what an evaluation found; a grown network's first state is saved anyway."""
        if self.metric is not None and self.metric in metrics:
            stage = None if transition is None else pl_module.stage
            self._judge(trainer, metrics[self.metric], stage)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Look at what a validation found."""
        is_part = trainer.sanity_checking or trainer.state.fn != "fit"
        if self.metric is not None and self.metric.startswith("val/") and not is_part:
            value = trainer.callback_metrics.get(self.metric)
            if value is not None:
                self._judge(trainer, float(value), None)

    def state_dict(self) -> dict[str, Any]:
        """The best value of the metric, and how many were worse since."""
        return {"metric": self.metric, "mode": self.mode, "best": self.best, "num_worse": self.num_worse}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run stopped, if the metric is the same."""
        if (state_dict["metric"], state_dict["mode"]) == (self.metric, self.mode):
            self.best, self.num_worse = state_dict["best"], state_dict["num_worse"]

    def _judge(self, trainer: pl.Trainer, value: float, stage: int | None) -> None:
        sign = 1 if self.mode == "max" else -1
        checkpointing = next(one for one in trainer.callbacks if isinstance(one, Checkpointing))
        if self.best is None or sign * (value - self.best) > self.min_delta:
            self.best, self.num_worse = value, 0
            checkpointing.keep_best(trainer, stage)
            return
        self.num_worse += 1
        if self.patience is not None and self.num_worse >= self.patience and not trainer.should_stop:
            rank_zero_info(
                f"step {trainer.global_step}: {self.metric} was no better than {self.best:.4f} for {self.num_worse} "
                "values, and the run ends"
            )
            trainer.should_stop = True
            checkpointing.save_now(trainer)

"""One metric that decides which checkpoint is the best one and, if asked to, when a run has seen enough."""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from callbacks.checkpointing import Checkpointing, is_complete
from modules.errors import InputError, require_not_negative
from modules.jsonl import append_jsonl, read_jsonl
from modules.language_model import LanguageModel

LOG_FILE = "monitor.jsonl"


@dataclass(frozen=True)
class Standing:
    """What is known of the metric.

    Attributes:
        best: its best value so far, of the checkpoint `name`.
        num_worse: values in a row since then that were no better.
    """

    best: float | None = None
    name: str | None = None
    num_worse: int = 0


class Monitor(pl.Callback):
    """Keeps the checkpoint with the best value of a metric as `checkpoints/best`, and stops a run that has ceased to
    improve.

    Values are compared whenever they are measured: `eval/<task>` by an evaluation, `val/...` by a validation; each is a
    line of `monitor.jsonl`, by which a resumed run knows also what was measured behind its checkpoint. Behind a
    transition a value may be the best one, but is not counted as no better: the network is to do what the former did. A
    run that is stopped before its last step ends without the decay of its learning rate.

    Args:
        metric: such as eval/arc_easy or val/bpb_en; nothing is watched when left out.
        mode: which values are better; auto takes min for `val/` and for tasks that count errors, else max.
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
        self._is_auto = mode == "auto"
        self.mode = mode if mode != "auto" else "min" if metric is not None and metric.startswith("val/") else "max"
        self.patience = patience
        self.min_delta = min_delta
        self.standing = Standing()

    def check(self, known: Collection[str], errors: Collection[str] = ()) -> None:
        """Raise `InputError` for a metric that the run is not going to measure.

        Args:
            known: what it measures.
            errors: those of which less is better, beside `val/`.
        """
        if self.metric is None:
            return
        if self.metric not in known:
            near = get_close_matches(self.metric, sorted(known), n=1)
            hint = f"did you mean {near[0]}?" if near else f"it measures {', '.join(sorted(known)) or 'none'}"
            raise InputError(f"monitor.metric={self.metric} is not measured in this run; {hint}")
        if self._is_auto and self.metric in errors:
            self.mode = "min"

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Go on where the run stood, also with what it measured behind its checkpoint; a best checkpoint that is not in
        this run's directory counts for nothing."""
        if self.metric is None:
            return
        standing = self.standing
        if trainer.is_global_zero:
            lines = [line for line in read_jsonl(self._log(trainer)) if self._is_mine(line)]
            if lines:
                standing = Standing(**lines[-1]["standing"])
            if standing.name is None or not is_complete(trainer, standing.name):
                standing = Standing()
        self.standing = trainer.strategy.broadcast(standing)
        _checkpointing(trainer).set_best(trainer, self.standing.name)

    def on_evaluation(
        self,
        trainer: pl.Trainer,
        pl_module: LanguageModel,
        metrics: Mapping[str, float],
        transition: Mapping[str, Any] | None,
    ) -> None:
        """Look at what an evaluation found."""
        if self.metric is not None and self.metric in metrics:
            self._judge(trainer, metrics[self.metric], pl_module.stage, transition is not None)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Look at what a validation found."""
        is_part = trainer.sanity_checking or trainer.state.fn != "fit"
        if self.metric is not None and self.metric.startswith("val/") and not is_part:
            value = trainer.callback_metrics.get(self.metric)
            if value is not None:
                self._judge(trainer, float(value), pl_module.stage, False)

    def state_dict(self) -> dict[str, Any]:
        """For a run that goes on in another directory."""
        return {"metric": self.metric, "mode": self.mode, "standing": asdict(self.standing)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the same metric, or begin with another one."""
        if self._is_mine(state_dict):
            self.standing = Standing(**state_dict["standing"])

    def _is_mine(self, record: Mapping[str, Any]) -> bool:
        return (record["metric"], record["mode"]) == (self.metric, self.mode)

    def _judge(self, trainer: pl.Trainer, value: float, stage: int, is_transition: bool) -> None:
        before, sign = self.standing, 1 if self.mode == "max" else -1
        is_better = before.best is None or sign * (value - before.best) > self.min_delta
        if is_better and math.isfinite(value):
            name = f"step-{trainer.global_step:08d}"
            self.standing = Standing(value, f"{name}-stage-{stage}" if is_transition else name)
        elif not is_transition:
            self.standing = Standing(before.best, before.name, before.num_worse + 1)
        stops = self.patience is not None and self.standing.num_worse >= self.patience and not trainer.should_stop
        if self.standing.name != before.name:
            _checkpointing(trainer).keep_best(trainer, str(self.standing.name), is_saved_anyway=is_transition)
        self._note(trainer, value, stage)
        if stops and not is_transition:
            worse = f"{self.metric} was no better than {before.best} for {self.standing.num_worse} values"
            rank_zero_info(f"step {trainer.global_step}: {worse}, and the run ends")
            trainer.should_stop = True
            _checkpointing(trainer).save_now(trainer)

    def _note(self, trainer: pl.Trainer, value: float, stage: int) -> None:
        if trainer.is_global_zero:
            when = {"step": trainer.global_step, "stage": stage}
            figure = value if math.isfinite(value) else None
            append_jsonl(self._log(trainer), {**when, "value": figure, **self.state_dict()})

    @staticmethod
    def _log(trainer: pl.Trainer) -> Path:
        return Path(trainer.default_root_dir) / LOG_FILE


def _checkpointing(trainer: pl.Trainer) -> Checkpointing:
    return next(one for one in trainer.callbacks if isinstance(one, Checkpointing))

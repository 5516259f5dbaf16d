"""What a person sees of a run: a bar on a terminal, and one line for each logged step."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.cadence import is_log_step, tokens_seen
from modules.errors import require_positive
from modules.functional.flops import count_parameters
from modules.language_model import LanguageModel

MAX_TASKS = 6
"""figures of an evaluation that a line shows"""


class Console(TQDMProgressBar):
    """The progress bar where there is a terminal, and a line per log step everywhere.

    Args:
        every_n_logs: print a line at every n-th logged step.
    """

    def __init__(self, every_n_logs: int = 1) -> None:
        require_positive(**{"console.every_n_logs": every_n_logs})
        super().__init__(refresh_rate=1, leave=False)
        self.every_n_logs = every_n_logs
        self._bar_wanted = sys.stderr.isatty()
        if not self._bar_wanted:
            self.disable()

    def hide_bar(self) -> None:
        """Lines only, also on a terminal."""
        self._bar_wanted = False
        self.disable()

    @property
    def total_train_batches(self) -> int:
        """The whole run is one epoch."""
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def enable(self) -> None:
        """Show the bar, where there is a terminal."""
        if self._bar_wanted:
            super().enable()

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Say what is trained, and where it begins."""
        super().on_train_start(trainer, pl_module)
        self._line(f"{_describe(pl_module)} · step {trainer.global_step} of {trainer.max_steps} · {pl_module.device}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One line of the latest figures."""
        if self._bar_wanted:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if is_log_step(trainer) and trainer.global_step // trainer.log_every_n_steps % self.every_n_logs == 0:
            self._line(_summary(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Bits per byte of each language."""
        super().on_validation_end(trainer, pl_module)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if metrics and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            values = "  ".join(f"{name.removeprefix('val/')} {value:.4f}" for name, value in sorted(metrics.items()))
            self._line(f"step {trainer.global_step:>6}  validation  {values}")

    def on_evaluation(
        self,
        trainer: pl.Trainer,
        pl_module: LanguageModel,
        metrics: Mapping[str, float],
        transition: Mapping[str, Any] | None,
    ) -> None:
        """The figure of each task, as far as they fit; `validate` prints all of them in the end."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        values = [f"{name.removeprefix('eval/')} {value:.3f}" for name, value in metrics.items()]
        rest = f"  and {len(values) - MAX_TASKS} more" if len(values) > MAX_TASKS else ""
        self._line(f"step {trainer.global_step:>6}  evaluation  {'  '.join(values[:MAX_TASKS])}{rest}")

    def on_transition(self, trainer: pl.Trainer, pl_module: LanguageModel, record: dict[str, Any]) -> None:
        """One line for the transition."""
        kind = " + ".join(record["kind"]) if isinstance(record["kind"], list) else record["kind"]
        self._line(
            f"step {record['step']:>6}  {kind}: {_describe(pl_module)} · loss {record['loss_before']:.4f} → "
            f"{record['loss_after']:.4f} · drift {record['max_logit_drift']:.2g} · "
            f"optimizer state {record['optimizer_state']} · {record['seconds']:.1f} s"
        )

    def _line(self, text: str) -> None:
        if not self.trainer.is_global_zero:
            return
        if self._bar_wanted:
            self.print(text)
        else:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()


_PARTS: list[tuple[str, str, Callable[[float], str]]] = [
    ("train/loss", "loss", lambda v: f"{v:.4f}"),
    ("train/grad_norm", "grad", lambda v: f"{v:.2f}"),
    ("train/lr", "lr", lambda v: f"{v:.2e}"),
    ("perf/tokens_per_s", "tok/s", lambda v: f"{v:,.0f}"),
    ("perf/mfu", "mfu", lambda v: f"{v:.1%}"),
    ("moe/load_cv", "load cv", lambda v: f"{v:.2f}"),
    ("moe/max_over_ideal", "max load", lambda v: f"{v:.2f}"),
]


def _summary(trainer: pl.Trainer) -> str:
    metrics: dict[str, float] = {}
    for callback in trainer.callbacks:
        metrics |= getattr(callback, "latest_metrics", {})
    figures = "  ".join(f"{label} {show(metrics[name])}" for name, label, show in _PARTS if name in metrics)
    return f"step {trainer.global_step:>6}  {tokens_seen(trainer) / 1e6:7.2f}M tokens  {figures}"


def _describe(module: LanguageModel) -> str:
    config, count = module.architecture, count_parameters(module.architecture)
    shape = f"dim {config.dim}, {config.num_layers} layers"
    if config.moe:
        shape += f", {config.moe.num_experts} experts top-{config.moe.top_k} in {len(config.routed_layers)} layers"
    return f"{shape}: {count.total / 1e6:.2f}M parameters, {count.active / 1e6:.2f}M active"

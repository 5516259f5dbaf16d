"""Losses, gradient norm, learning rate and data position of the steps that are logged."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from callbacks.cadence import finished_step, is_log_step, tokens_seen
from modules.language_model import LanguageModel, growth_metrics, log_metrics
from modules.world import ONE_PROCESS, World


class TrainingLog(pl.Callback):
    """Logs `train/*`, `data/*` and `growth/*`. A logged loss is that of the step alone, over its micro-batches.

    Sums stay on the device until a step is logged.
    """

    def __init__(self) -> None:
        self.latest_metrics: dict[str, float] = {}
        self._samples: list[int] = []
        self._counts: Tensor | None = None
        self._new: Tensor | None = None
        self._world: World = ONE_PROCESS
        self._sums: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Log the model's size, and set up the counters of each language."""
        log_metrics(trainer, growth_metrics(pl_module) | {"data/tokens": tokens_seen(trainer)})
        saved = self._samples or [0] * len(trainer.datamodule.languages)
        self._counts = torch.tensor(saved, device=pl_module.device)
        self._new = torch.zeros_like(self._counts)
        self._world = pl_module.world

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LanguageModel, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Add up this micro-batch, and log at the end of a step that is to be logged."""
        num_languages = len(trainer.datamodule.languages)
        assert self._new is not None
        samples = torch.zeros_like(self._new).index_add_(0, batch["language"], torch.ones_like(batch["language"]))
        self._new += samples
        losses = outputs["losses_BL"].mean(dim=1)
        self._add("loss", outputs["lm_loss"])
        self._add("samples", samples)
        self._add("by_language", losses.new_zeros(num_languages).index_add_(0, batch["language"], losses))
        if is_log_step(trainer):
            self.latest_metrics = self._collect(trainer, pl_module)
            log_metrics(trainer, self.latest_metrics)
        if finished_step(trainer):
            self._sums.clear()

    def on_transition(self, trainer: pl.Trainer, pl_module: LanguageModel, record: dict[str, Any]) -> None:
        """Mark the transition in every logger."""
        drift = {"growth/logit_drift": record["max_logit_drift"], "data/tokens": record["tokens"]}
        log_metrics(trainer, growth_metrics(pl_module) | drift)

    def state_dict(self) -> dict[str, Any]:
        """Samples seen of each language, by all processes."""
        return {"samples": [] if self._counts is None else self._count_samples().tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the counts of a checkpoint."""
        self._samples = list(state_dict["samples"])

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()

    def _count_samples(self) -> Tensor:
        """Samples of each language so far, by all processes."""
        assert self._counts is not None and self._new is not None
        self._counts += self._world.sum_over_data(self._new)
        self._new.zero_()
        return self._counts

    def _collect(self, trainer: pl.Trainer, pl_module: LanguageModel) -> dict[str, float]:
        dm, counts = trainer.datamodule, self._count_samples().tolist()
        sums = {name: self._world.sum_over_data(value) for name, value in self._sums.items()}
        micro_batches = trainer.accumulate_grad_batches
        metrics: dict[str, float] = {
            "train/loss": (sums["loss"] / micro_batches).item(),
            "train/grad_norm": float(pl_module.grad_norm),
            "train/lr": pl_module.learning_rate,
            "data/tokens": tokens_seen(trainer),
            "growth/stage": pl_module.stage,
        }
        for i, language in enumerate(dm.languages):
            metrics[f"data/tokens_{language}"] = counts[i] * dm.seq_len
            if sums["samples"][i] > 0:
                metrics[f"train/loss_{language}"] = (sums["by_language"][i] / sums["samples"][i]).item()
        return metrics

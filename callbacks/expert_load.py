"""How evenly the routers use their experts."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from callbacks.cadence import finished_step, is_log_step, tokens_seen
from modules.jsonl import append_jsonl
from modules.language_model import LanguageModel, log_metrics

LOG_FILE = "expert_load.jsonl"
_MEANS = {"balance_loss": "moe/balance_loss", "z_loss": "moe/z_loss", "router_entropy": "moe/entropy"}
_WATCHED = ("expert_rows", *_MEANS)


class ExpertLoad(pl.Callback):
    """Logs `moe/*` of the steps that are logged, and each layer's shares to `expert_load.jsonl`."""

    def __init__(self) -> None:
        self.latest_metrics: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._micro_batches = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up on the device; log at the steps that are logged."""
        if "expert_rows" not in outputs:
            return
        for name in _WATCHED:
            self._sums[name] = self._sums[name] + outputs[name] if self._micro_batches else outputs[name].clone()
        self._micro_batches += 1
        if is_log_step(trainer):
            means = {metric: (self._sums[name] / self._micro_batches).item() for name, metric in _MEANS.items()}
            self.latest_metrics = expert_load_metrics(self._sums["expert_rows"]) | means
            log_metrics(trainer, self.latest_metrics)
            if trainer.is_global_zero:
                self._write(trainer, pl_module, self._sums["expert_rows"])
        if finished_step(trainer):
            self._micro_batches = 0

    def on_transition(self, trainer: pl.Trainer, pl_module: LanguageModel, record: dict[str, Any]) -> None:
        """What was seen is of the network before."""
        self.latest_metrics = {}

    def _write(self, trainer: pl.Trainer, pl_module: LanguageModel, rows: Tensor) -> None:
        shares = (rows.double() / rows.sum(dim=1, keepdim=True)).tolist()
        layers = pl_module.architecture.routed_layers
        record = {
            "step": trainer.global_step,
            "tokens": tokens_seen(trainer),
            "layers": {
                str(layer): [round(share, 5) for share in row] for layer, row in zip(layers, shares, strict=True)
            },
        }
        append_jsonl(Path(trainer.default_root_dir) / LOG_FILE, record)


def expert_load_metrics(rows_NE: Tensor) -> dict[str, float]:
    """Load figures over layers N and experts E from counts of routed rows.

    `load_cv`: coefficient of variation over experts, mean of layers; `max_over_ideal`: the fullest expert of any layer
    against an even load; `dead_fraction`: share of experts without a row.
    """
    load = rows_NE.double() / rows_NE.double().mean(dim=1, keepdim=True)
    return {
        "moe/load_cv": load.std(dim=1, correction=0).mean().item(),
        "moe/max_over_ideal": load.max().item(),
        "moe/dead_fraction": (rows_NE == 0).to(torch.float64).mean().item(),
    }

"""How evenly the routers use their experts."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from callbacks.cadence import is_log_step, tokens_seen
from modules.jsonl import append_jsonl
from modules.language_model import LanguageModel, log_metrics

LOG_FILE = "expert_load.jsonl"


class ExpertLoad(pl.Callback):
    """Logs `moe/*` over the tokens since the last log, and each layer's shares to `expert_load.jsonl`."""

    def __init__(self) -> None:
        self.latest_metrics: dict[str, float] = {}
        self._rows: Tensor | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up routed rows on the device; log at the steps that are logged."""
        if "expert_rows" not in outputs:
            return
        rows = outputs["expert_rows"]
        self._rows = rows.clone() if self._rows is None else self._rows + rows
        if not is_log_step(trainer):
            return
        load = expert_load_metrics(self._rows)
        losses = {f"moe/{name}": outputs[name].item() for name in ("balance_loss", "z_loss")}
        self.latest_metrics = load | losses | {"moe/entropy": outputs["router_entropy"].item()}
        log_metrics(trainer, self.latest_metrics)
        if trainer.is_global_zero:
            self._write(trainer, pl_module, self._rows)
        self._rows = None

    def on_transition(self, trainer: pl.Trainer, pl_module: LanguageModel, record: dict[str, Any]) -> None:
        """The routers of the new network start their own count."""
        self._rows, self.latest_metrics = None, {}

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

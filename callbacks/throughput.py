"""Step time, tokens per second, memory, and the share of the device's peak where the peak is known."""

import resource
import statistics
import time
from collections import deque
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch

from callbacks.cadence import is_log_step, starts_step
from modules.errors import require_positive
from modules.functional.flops import training_flops_per_token
from modules.language_model import LanguageModel, log_metrics

PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bf16 FLOP/s of devices by a part of their name (makers' data sheets, SXM)."""

WINDOW = 10
"""Steps whose median is the step time, at least: validation and checkpoints between steps are outliers to it."""


class Throughput(pl.Callback):
    """Logs `perf/*` and `memory/peak_mib`. Times are taken on the host and never wait for the device.

    Args:
        peak_flops: FLOP/s of one device at the run's precision, for MFU; empty: from a table of devices.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        if peak_flops is not None:
            require_positive(**{"throughput.peak_flops": float(peak_flops)})
        self.peak_flops = peak_flops
        self.latest_metrics: dict[str, float] = {}
        self._starts: deque[float] = deque(maxlen=WINDOW + 1)

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Size the window, and look the device up."""
        self._starts = deque(maxlen=max(WINDOW, trainer.log_every_n_steps) + 1)
        self.peak_flops = self.peak_flops or data_sheet_peak(pl_module.device)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: LanguageModel, batch: Any, batch_idx: int) -> None:
        """Note when the step starts."""
        if starts_step(trainer, batch_idx):
            self._starts.append(time.perf_counter())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at the steps that are logged, once there is an interval to tell of."""
        if is_log_step(trainer) and len(self._starts) > 1:
            self.latest_metrics = self._collect(trainer, pl_module)
            log_metrics(trainer, self.latest_metrics)

    def on_transition(self, trainer: pl.Trainer, pl_module: LanguageModel, record: dict[str, Any]) -> None:
        """Forget the step times of the model before."""
        self._starts.clear()

    def _collect(self, trainer: pl.Trainer, pl_module: LanguageModel) -> dict[str, float]:
        seconds = statistics.median(later - earlier for earlier, later in pairwise(self._starts))
        dm = trainer.datamodule
        tokens = dm.batch_size * dm.seq_len * trainer.accumulate_grad_batches * pl_module.world.data_ranks
        metrics = {"perf/step_ms": 1000 * seconds, "perf/tokens_per_s": tokens / seconds}
        metrics["memory/peak_mib"] = peak_memory(pl_module.device) / 2**20
        if self.peak_flops:
            flops = training_flops_per_token(pl_module.architecture, dm.seq_len) * tokens / seconds
            metrics["perf/mfu"] = flops / (self.peak_flops * trainer.world_size)
        return metrics


def peak_memory(device: torch.device) -> int:
    """Bytes at the most so far, of a GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def data_sheet_peak(device: torch.device) -> float | None:
    """FLOP/s of a GPU in bfloat16 by its maker; None where it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)

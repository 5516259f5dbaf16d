"""Step time, tokens per second, memory, and the share of the device's peak where the peak is known."""

import resource
import statistics
from typing import Any

import lightning.pytorch as pl
import torch

from callbacks.cadence import is_log_step
from callbacks.step_clock import clock_of
from modules.errors import require_positive
from modules.functional.flops import training_flops_per_token
from modules.language_model import LanguageModel, log_metrics

PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bf16 FLOP/s of devices by a part of their name (makers' data sheets, SXM)."""


class Throughput(pl.Callback):
    """Logs `perf/*` and `memory/peak_mib`, of the median step since the last one that was logged (see `StepClock`).

    Args:
        peak_flops: FLOP/s of one device at the run's precision, for MFU; empty: from a table of devices.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        if peak_flops is not None:
            require_positive(**{"throughput.peak_flops": float(peak_flops)})
        self.peak_flops = peak_flops
        self.latest_metrics: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Look the device up."""
        self.peak_flops = self.peak_flops or data_sheet_peak(pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at the steps that are logged."""
        if is_log_step(trainer):
            self.latest_metrics = self._collect(trainer, pl_module)
            log_metrics(trainer, self.latest_metrics)

    def _collect(self, trainer: pl.Trainer, pl_module: LanguageModel) -> dict[str, float]:
        clock, dm = clock_of(trainer), trainer.datamodule
        seconds = statistics.median(clock.steps)
        tokens = dm.batch_size * dm.seq_len * trainer.accumulate_grad_batches * pl_module.world.data_ranks
        metrics = {"perf/step_ms": 1000 * seconds, "perf/data_wait_ms": 1000 * statistics.median(clock.waits)}
        metrics |= {"perf/tokens_per_s": tokens / seconds, "perf/accelerator_s": trainer.world_size * clock.seconds}
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

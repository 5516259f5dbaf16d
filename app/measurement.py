"""What a step of a run takes on a machine: a record that names the machine, so that only like is compared with like."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.doctor.devices import describe_processors, measure_rates
from app.doctor.versions import installed_versions
from callbacks.step_meter import StageTimes
from callbacks.throughput import data_sheet_peak
from modules.errors import InputError
from modules.functional.flops import count_parameters, training_flops_per_token
from modules.growth.stage import GrowthStage

FORMAT = 1
SPEED_VERSIONS = ("growmoe", "torch", "lightning", "python")
"""Libraries whose versions decide about a step's time."""


@dataclass(frozen=True)
class Batch:
    """What all stages of a run have in common.

    Attributes:
        samples: of an optimizer step, on all processes.
        seq_len: tokens of a sample.
    """

    samples: int
    seq_len: int

    @property
    def tokens(self) -> int:
        """Of an optimizer step."""
        return self.samples * self.seq_len


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one device, and where the figure is from."""

    flops: float
    source: str


def describe_machine(device: torch.device, num_devices: int) -> dict[str, Any]:
    """What must be equal for step times to be comparable."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else describe_processors()
    return {"device": name, "devices": num_devices}


def peak_of(device: torch.device, precision: str, given: float | None) -> Peak:
    """The given one, the maker's, or else that of a matrix product, measured now."""
    if given is not None:
        return Peak(given, "given")
    sheet = data_sheet_peak(device)
    if sheet is not None:
        return Peak(sheet, "data sheet, bfloat16")
    rates = measure_rates(device)
    is_half = "bf16" in precision
    return Peak(rates.bf16 if is_half else rates.fp32, f"measured product in {'bfloat16' if is_half else 'float32'}")


def measurement_record(
    times: Sequence[StageTimes],
    recipe: Sequence[GrowthStage],
    batch: Batch,
    machine: dict[str, Any],
    layout: str,
    precision: str,
    peak: Peak,
) -> dict[str, Any]:
    """Plain JSON: the machine, and each stage with its sizes, its times and what makes it begin."""
    versions = {name: version for name, version in installed_versions().items() if name in SPEED_VERSIONS}
    triggers = [None, *(stage.when for stage in recipe)]
    return {
        "format": FORMAT,
        "machine": machine,
        "versions": versions,
        "layout": layout,
        "precision": precision,
        "seq_len": batch.seq_len,
        "samples_per_step": batch.samples,
        "tokens_per_step": batch.tokens,
        "peak": asdict(peak),
        "stages": [
            {"trigger": trigger, **_stage_record(stage, batch, machine["devices"] * peak.flops)}
            for trigger, stage in zip(triggers, times, strict=True)
        ],
    }


def read_measurement(path: Path) -> dict[str, Any]:
    """A record from a file; raises `InputError` for anything else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a measurement ({error}); delete it to measure again") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"{path} is no measurement of format {FORMAT}; delete it to measure again")
    return record


def _stage_record(stage: StageTimes, batch: Batch, peak_flops: float) -> dict[str, Any]:
    count = count_parameters(stage.architecture)
    flops = training_flops_per_token(stage.architecture, batch.seq_len)
    low, high = np.percentile(stage.steps, (25, 75))
    return {
        "architecture": stage.architecture.to_dict(),
        "parameters": {**asdict(count), "active_non_embedding": count.active_non_embedding},
        "flops_per_token": flops,
        "step_s": stage.median,
        "step_s_quartiles": [float(low), float(high)],
        "steps_s": stage.steps,
        "wait_s": float(np.median(stage.waits)),
        "tokens_per_s": batch.tokens / stage.median,
        "mfu": flops * batch.tokens / stage.median / peak_flops,
        "peak_mib": stage.peak_bytes / 2**20,
        "parts_s": stage.parts,
        "transition_s": stage.transition,
    }

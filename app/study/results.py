"""What a finished run came to, from its logs."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from app.report.data import RunData, load_run, scores
from modules.errors import InputError
from modules.functional.budget import RunCost


def result_of(run_dir: Path, steps: int, cost: RunCost) -> dict[str, Any]:
    """Losses of the last validation, accuracies at the last step, and the validations on the way.

    Raises:
        InputError: a run that was not validated at its last step.
    """
    data = load_run(run_dir)
    curve = _curve(data, cost)
    if curve["steps"][-1:] != [steps]:
        raise InputError(f"{run_dir} was not validated at its last step {steps}, so that there is nothing to compare")
    tasks = {}
    if data.evaluations and data.evaluations[-1]["step"] == steps:
        for score in scores(data.evaluations[-1]):
            tasks[score.task] = {"value": score.value, "stderr": score.stderr, "chance": score.chance}
    taken = data.series("perf/accelerator_s")
    return {
        "accelerator_seconds_taken": float(taken.y[-1]) if taken else None,
        "versions": data.versions,
        "loss": curve["loss"][-1],
        "bpb": curve["bpb"][-1],
        "bpb_by_language": {name: float(data.series(f"val/bpb_{name}").y[-1]) for name in _languages(data)},
        "tasks": tasks,
        "curve": curve,
    }


def _languages(data: RunData) -> list[str]:
    return [name for name in data.languages if data.series(f"val/bpb_{name}")]


def _curve(data: RunData, cost: RunCost) -> dict[str, list[float]]:
    """Every validation: steps, tokens, what was spent until then, and the losses; bpb is the mean over languages."""
    losses = data.columns.get("val/loss", np.full(len(data.steps), math.nan))
    rows = [row for row in range(len(data.steps)) if math.isfinite(losses[row])]
    columns = [data.columns[f"val/bpb_{name}"] for name in _languages(data)]
    steps: list[float] = [int(data.steps[row]) for row in rows]
    return {
        "steps": steps,
        "tokens": [step * cost.tokens_per_step for step in steps],
        "accelerator_seconds": [cost.accelerator_seconds(int(step)) for step in steps],
        "flops": [cost.flops(int(step)) for step in steps],
        "loss": [float(losses[row]) for row in rows],
        "bpb": [float(np.mean([column[row] for column in columns])) for row in rows],
    }

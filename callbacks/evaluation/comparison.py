"""Two evaluations side by side: differences, and how far chance alone would take them."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modules.errors import InputError


@dataclass(frozen=True)
class Difference:
    """One metric of one task in two evaluations.

    Attributes:
        value, other: of the first and of the second.
        stderr: the standard error of value - other; None where a metric has none.
        is_paired: it is that of the differences between answers to the same questions (Miller, arXiv 2411.00640), and
            not of two independent samples, which is larger.
    """

    task: str
    metric: str
    value: float
    other: float
    stderr: float | None
    is_paired: bool

    @property
    def difference(self) -> float:
        """How much the first is above the second."""
        return self.value - self.other


def read_record(path: Path) -> dict[str, Any]:
    """An evaluation that was written before. Raises `InputError` for a file that holds none."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"compare={path} cannot be read ({reason}); give the JSON file of an evaluation") from None
    results = record.get("results") if isinstance(record, dict) else None
    if not isinstance(results, dict) or not all(isinstance(metrics, dict) for metrics in results.values()):
        raise InputError(
            f"compare={path} holds no results; give a file that evaluate --output wrote, or a run's eval/step-*.json"
        )
    return record


def compare(record: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    """The metrics that two evaluations have in common, in the order of the first."""
    found = []
    for task, metrics in record["results"].items():
        others = other["results"].get(task, {})
        for metric, value in metrics.items():
            name, comma, suffix = metric.partition(",")
            theirs = others.get(metric)
            if value is None or theirs is None or name == "chance" or name.endswith("_stderr"):
                continue
            stderr = _paired_error(record, other, task, metric)
            is_paired = stderr is not None
            if stderr is None:
                errors = [one.get(f"{name}_stderr{comma}{suffix}") for one in (metrics, others)]
                stderr = None if None in errors else math.hypot(*errors)
            found.append(Difference(task, metric, value, theirs, stderr, is_paired))
    return found


def other_questions(record: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Tasks of both that asked different things: other data, shots, limit or version."""
    hashes = [one.get("hashes", {}).get("tasks", {}) for one in (record, other)]
    return [task for task in hashes[0] if task in hashes[1] and hashes[0][task] != hashes[1][task]]


def _paired_error(record: Mapping[str, Any], other: Mapping[str, Any], task: str, metric: str) -> float | None:
    """The standard error over questions that both answered; None where they cannot be paired."""
    members = record.get("groups", {}).get(task, [task])
    answers = []
    for one in (record, other):
        found = [one.get("right", {}).get(member, {}).get(metric) for member in members]
        if not found or None in found:
            return None
        answers.append(np.array([int(mark) for marks in found for mark in marks]))
    changed = set(other_questions(record, other)) & set(members)
    mine, theirs = answers
    if changed or len(mine) != len(theirs) or len(mine) < 2:
        return None
    means = (record["results"][task][metric], other["results"][task][metric])
    if not np.allclose((mine.mean(), theirs.mean()), means, atol=1e-6):  # a group that weighs its tasks alike
        return None
    return float(np.std(mine - theirs, ddof=1) / math.sqrt(len(mine)))

"""What a run directory holds, read for its report."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from app.checkpoint_folder import list_checkpoints
from app.metrics_table import FILE_NAME, read_table
from callbacks.evaluation.results import ACCURACIES
from modules.config import MANIFEST
from modules.errors import InputError
from modules.jsonl import read_jsonl

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Series:
    """One metric over the run; only the steps at which it was logged."""

    x: np.ndarray
    """tokens seen, or steps in a run that did not log its tokens"""
    y: np.ndarray

    def __bool__(self) -> bool:
        return len(self.x) > 0


@dataclass(frozen=True)
class Score:
    """The accuracy of one task in one evaluation."""

    task: str
    metric: str
    value: float
    stderr: float | None
    chance: float | None
    """what guessing reaches"""
    documents: Any
    shots: Any


@dataclass(frozen=True)
class RunData:
    """The logs of one run."""

    run_dir: Path
    steps: np.ndarray
    """steps of the rows of metrics.csv, ascending"""
    columns: dict[str, np.ndarray]
    """metric name -> one value per row, NaN where it was not logged"""
    transitions: list[Record]
    evaluations: list[Record]
    """contents of eval/step-*.json, by step; at a transition, those of the old network come first"""
    expert_load: list[Record]
    language_load: list[Record]
    """how each language uses the experts, by validation"""
    config_text: str | None
    manifest: Record | None
    """of the newest checkpoint"""

    @cached_property
    def has_tokens(self) -> bool:
        """Whether x axes count tokens; otherwise they count steps."""
        return int(np.isfinite(self.columns.get("data/tokens", np.empty(0))).sum()) >= 2

    @property
    def x_name(self) -> str:
        """What the x axes count."""
        return "tokens" if self.has_tokens else "steps"

    def x_at(self, steps: Iterable[float]) -> np.ndarray:
        """Tokens seen at these steps, by straight lines between and beyond the logged ones; the steps without."""
        steps = np.asarray(list(steps), dtype=float)
        if not self.has_tokens:
            return steps
        tokens = self.columns["data/tokens"]
        known = np.isfinite(tokens)
        s, t = self.steps[known].astype(float), tokens[known]
        x = np.interp(steps, s, t)
        x = np.where(steps < s[0], t[0] + (steps - s[0]) * (t[1] - t[0]) / (s[1] - s[0]), x)
        x = np.where(steps > s[-1], t[-1] + (steps - s[-1]) * (t[-1] - t[-2]) / (s[-1] - s[-2]), x)
        return np.maximum(x, 0.0)

    def x_of(self, record: Record) -> float:
        """Where a record (of a transition, an evaluation, an expert load) lies on the x axes."""
        if self.has_tokens and _is_number(record.get("tokens")):
            return float(record["tokens"])
        return float(self.x_at([record["step"]])[0])

    def series(self, name: str) -> Series:
        """One metric of metrics.csv; empty if it was never logged."""
        values = self.columns.get(name, np.full(len(self.steps), np.nan))
        known = np.isfinite(values)
        return Series(self._x_of_rows[known], values[known])

    def names(self, prefix: str) -> list[str]:
        """The logged metrics that begin with `prefix`, sorted."""
        return sorted(name for name in self.columns if name.startswith(prefix) and self.series(name))

    @cached_property
    def languages(self) -> list[str]:
        """Language codes that appear in metric names, sorted."""
        names = (re.fullmatch(r"(?:train/loss|val/bpb|data/tokens)_(.+)", name) for name in self.columns)
        return sorted({match[1] for match in names if match})

    @cached_property
    def accuracies(self) -> dict[str, Series]:
        """Accuracy over the run of each task that was asked for: from the evaluation files, else from the metrics."""
        points: dict[str, list[tuple[float, float]]] = {}
        for evaluation in self.evaluations:
            for score in scores(evaluation):
                points.setdefault(score.task, []).append((self.x_of(evaluation), score.value))
        found = {task: Series(*map(np.array, zip(*of_task, strict=True))) for task, of_task in points.items()}
        logged = {name.removeprefix("eval/"): self.series(name) for name in self.names("eval/")}
        asked = {task: s for task, s in logged.items() if task in found or (s.y.min() >= 0 and s.y.max() <= 1)}
        return {task: found.get(task, series) for task, series in sorted(asked.items())} or dict(sorted(found.items()))

    @cached_property
    def chances(self) -> dict[str, float]:
        """What guessing reaches per task, as far as an evaluation says."""
        found = [score for evaluation in self.evaluations for score in scores(evaluation)]
        return {score.task: score.chance for score in found if score.chance is not None}

    @property
    def last_step(self) -> int:
        """The last step that anything in the run directory speaks of."""
        metadata = self.metadata
        recorded = [metadata] if _is_number(metadata.get("step")) else []
        steps = [record["step"] for record in (*recorded, *self.transitions, *self.evaluations)]
        return int(max([0, *self.steps[-1:], *steps]))

    @property
    def metadata(self) -> Record:
        """What the newest checkpoint says of itself."""
        return _object(_object(self.manifest).get("metadata"))

    @cached_property
    def is_synthetic(self) -> bool:
        """Whether the run learned the embedded invented world, not real text."""
        try:
            config = yaml.safe_load(self.config_text or "")
        except yaml.YAMLError:
            config = None
        data = _object(config).get("data")
        names = [_object(data).get("class_path", data), _object(self.metadata.get("data")).get("class")]
        return any(isinstance(name, str) and name.rsplit(".", 1)[-1] == "SyntheticWorld" for name in names)

    @property
    def versions(self) -> dict[str, str]:
        """Library versions that the newest checkpoint was written with."""
        return {name: str(version) for name, version in _object(self.metadata.get("versions")).items()}

    @cached_property
    def _x_of_rows(self) -> np.ndarray:
        return self.x_at(self.steps)


def load_run(run_dir: Path) -> RunData:
    """Read the logs of a run. Raises InputError for a folder that has no metrics.csv, or an unreadable one."""
    path = run_dir / FILE_NAME
    if not path.is_file():
        what = "is not a run directory: it has no metrics.csv" if run_dir.is_dir() else "does not exist"
        raise InputError(f"{run_dir} {what}; give the directory that `growmoe fit` wrote its logs to")
    table = read_table(path)
    columns = {name: np.array([_number(row.get(name)) for row in table.rows.values()]) for name in table.names}
    config = run_dir / "config.yaml"
    return RunData(
        run_dir=run_dir,
        steps=np.array(list(table.rows), dtype=np.int64),
        columns=columns,
        transitions=_by_step(read_jsonl(run_dir / "transitions.jsonl")),
        evaluations=_by_step(_read_evaluations(run_dir / "eval")),
        expert_load=_last_of_each_step(run_dir / "expert_load.jsonl"),
        language_load=_last_of_each_step(run_dir / "language_load.jsonl"),
        config_text=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
        manifest=_newest_manifest(run_dir / "checkpoints"),
    )


def scores(evaluation: Record) -> list[Score]:
    """The accuracy of each task or group of one evaluation, with its chance level if that is known."""
    documents, shots, groups = (_object(evaluation.get(key)) for key in ("num_samples", "num_fewshot", "groups"))
    members = {task for tasks in groups.values() for task in tasks}
    found = []
    for task, result in evaluation["results"].items():
        if task in members:
            continue
        known = {key: float(value) for key, value in result.items() if _is_number(value)}
        metric = next((key for name in ACCURACIES for key in known if key.partition(",")[0] == name), None)
        if metric is not None:
            name, comma, variant = metric.partition(",")
            stderr, chance = known.get(f"{name}_stderr{comma}{variant}"), known.get("chance")
            found.append(Score(task, metric, known[metric], stderr, chance, documents.get(task), shots.get(task)))
    return sorted(found, key=lambda score: score.task)


def _read_evaluations(folder: Path) -> list[Record]:
    found = []
    for path in folder.glob("step-*.json"):
        if re.fullmatch(r"step-\d+\.json", path.name):
            record = _read_json(path)
            found += [_object(record.get("before_transition")), record]
    found = [record for record in found if isinstance(record.get("results"), dict)]
    return [{**r, "results": {task: v for task, v in r["results"].items() if isinstance(v, dict)}} for r in found]


def _newest_manifest(folder: Path) -> Record | None:
    manifests = (_read_json(path / MANIFEST) for path in reversed(list_checkpoints(folder)))
    return next((manifest for manifest in manifests if manifest), None)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty for a file that is missing or holds none (a report shows what can be read)."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return _object(value)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _by_step(records: Iterable[Record]) -> list[Record]:
    return sorted((r for r in records if _is_number(r.get("step"))), key=lambda record: record["step"])


def _last_of_each_step(path: Path) -> list[Record]:
    return list({record["step"]: record for record in _by_step(read_jsonl(path))}.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")

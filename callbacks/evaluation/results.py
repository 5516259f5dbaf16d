"""What lm-eval's numbers mean: plain names, the one figure of a task, and the accuracy that guessing would reach."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from callbacks.evaluation.tasks import LoadedTasks

ACCURACIES = ("acc", "exact_match", "em", "acc_norm", "acc_bytes")
"""metrics that are shares of right answers, the one that speaks for its task first"""

FIGURES = 6
"""Significant digits of what is no accuracy: as many as float32 gives on any number of processes."""


@dataclass
class Outcome:
    """What an evaluation found.

    Attributes:
        results: for every task and group its metrics (accuracies in 0..1) by name, with the standard error of
            accuracies as `<metric>_stderr`, and `chance`, the accuracy of guessing, where it is known.
        headline: the one figure of each task that was asked for.
        num_samples, num_fewshot: documents and shots by task.
        versions: of lm-eval, datasets and the tasks.
        hashes: `tasks`: of all that was asked, by task; `tokenizer`; `mirror`, if data came from one.
        groups: the tasks of each group.
        right: by task and accuracy, a 1 or a 0 for each document in its order, where answers are right or wrong.
        examples: questions with the answers that were given; for tables, no part of the record.
        conditions: the suite, the limit of documents, the seed of the shots, and tasks that were left out.
    """

    results: dict[str, dict[str, float | None]] = field(default_factory=dict)
    headline: dict[str, float | None] = field(default_factory=dict)
    num_samples: dict[str, int] = field(default_factory=dict)
    num_fewshot: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    hashes: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    right: dict[str, dict[str, str]] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, tasks: LoadedTasks, limit: int | float | None, tokenizer_hash: str, seed: int) -> "Outcome":
        """An empty one, with what is evaluated and under which conditions."""
        found = cls(conditions={"suite": tasks.suite.name, "limit": limit, "seed": seed})
        if tasks.missing:
            found.conditions["missing"] = sorted(tasks.missing)
        found.hashes = {"tokenizer": tokenizer_hash, "tasks": {}}
        if tasks.mirror_hash is not None:
            found.hashes["mirror"] = tasks.mirror_hash
        return found

    def add(self, other: "Outcome") -> None:
        """Take in what was found for another task."""
        for name in ("results", "headline", "num_samples", "num_fewshot", "versions", "groups", "right"):
            getattr(self, name).update(getattr(other, name))
        self.hashes["tasks"].update(other.hashes["tasks"])
        self.examples += other.examples

    def record(self) -> dict[str, Any]:
        """Plain JSON; the same on any number of processes."""
        names = ("results", "num_samples", "num_fewshot", "versions", "hashes", "groups", "right")
        return {**self.conditions, **{name: getattr(self, name) for name in names}}


def right_answers(samples: Sequence[dict[str, Any]]) -> dict[str, str]:
    """By accuracy, with its filter as in `clean_metrics`, a 1 or a 0 for each document."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        for name in ACCURACIES:
            if isinstance(sample.get(name), (int, float)):
                found.setdefault(name + suffix, []).append(float(sample[name]))
    whole = {name: values for name, values in found.items() if set(values) <= {0.0, 1.0}}
    return {name: "".join("1" if value else "0" for value in values) for name, values in whole.items()}


def headline(metrics: dict[str, float | None]) -> float | None:
    """The one figure of a task: its accuracy where it has one, else its first metric."""
    names = [key for key in metrics if key != "chance" and "_stderr" not in key]
    for wanted in ACCURACIES:
        for key in names:
            if key.split(",")[0] == wanted:
                return metrics[key]
    return metrics[names[0]]


def headline_names(name: str, entry: dict[str, Any]) -> list[str]:
    """What a name of a suite gets a figure for: the task or group, or the tasks of a tag or of a group without a mean.

    Args:
        name: the suite's.
        entry: what lm-eval has loaded for it.
    """
    group = entry.get("groups", {}).get(name)
    has_mean = group is not None and bool(group.aggregate_metric_list)
    return [name] if name in entry["tasks"] or has_mean else list(entry["tasks"])


def counts_errors(entry: dict[str, Any]) -> bool:
    """Whether less is better of the figure that speaks for loaded tasks: it is no accuracy, but, say, a perplexity."""
    for task in entry["tasks"].values():
        metrics = list(task.aggregation())
        if not set(metrics) & set(ACCURACIES) and task.higher_is_better().get(metrics[0]) is False:
            return True
    return False


def clean_metrics(raw: dict[str, Any]) -> dict[str, float | None]:
    """Metrics by plain names: `acc` for lm-eval's `acc,none`; other filters keep theirs, as in `exact_match,strict`.

    Accuracies get their standard error, `acc_stderr`: sqrt(p (1 - p) / (n - 1)), which for answers that are right or
    wrong is the formula of lm-eval; for a group, as if its documents were those of one task. A number that is not
    finite becomes None, as in JSON.
    """
    metrics: dict[str, float | None] = {}
    for key, value in raw.items():
        name, comma, filter_name = key.partition(",")
        if not comma or isinstance(value, str):  # name, alias and counts; "N/A" for a missing standard error
            continue
        suffix = "" if filter_name == "none" else f",{filter_name}"
        number = float(value)
        if name not in ACCURACIES:
            number = float(f"{number:.{FIGURES}g}")
        metrics[name + suffix] = number if math.isfinite(number) else None
        if name in ACCURACIES and 0 <= number <= 1 and raw["sample_len"] > 1:
            metrics[f"{name}_stderr{suffix}"] = math.sqrt(number * (1 - number) / (raw["sample_len"] - 1))
    return metrics


def chance_levels(loaded: dict[str, Any]) -> dict[str, float | None]:
    """The accuracy of guessing.

    For multiple choice the mean of right answers / choices over the documents that were just evaluated; for other tasks
    what `metadata: {chance: ...}` of their YAML says; for a group the mean of its tasks'. None where it is not known.
    """
    levels: dict[str, tuple[float | None, int]] = {}
    for name, task in loaded["tasks"].items():
        levels[name] = _task_chance(task)
    for name, group in loaded.get("groups", {}).items():
        children = [levels[task.task_name] for task in group.get_all_tasks()]
        by_size = all(metric.weight_by_size for metric in group.aggregate_metric_list or [])
        weights = [size if by_size else 1 for _, size in children]
        known = [chance * weight for (chance, _), weight in zip(children, weights, strict=True) if chance is not None]
        complete_group = len(known) == len(children) and sum(weights) > 0
        levels[name] = (sum(known) / sum(weights) if complete_group else None, sum(size for _, size in children))
    return {name: chance for name, (chance, _) in levels.items()}


def _task_chance(task: Any) -> tuple[float | None, int]:
    """Chance of one task over the documents that were just evaluated, and their number."""
    choices: dict[int, int] = {}
    documents: dict[int, Any] = {}
    for instance in task.instances:
        choices[instance.doc_id] = choices.get(instance.doc_id, 0) + 1
        documents[instance.doc_id] = instance.doc
    if task.OUTPUT_TYPE != "multiple_choice" or not {"acc", "acc_norm", "acc_bytes"} & set(task.aggregation()):
        return (task.get_config("metadata") or {}).get("chance"), len(documents)
    if "acc_mutual_info" in task.aggregation():
        choices = {number: count // 2 for number, count in choices.items()}  # each is asked without its context too
    right = dict.fromkeys(documents, 1)
    if getattr(task, "multiple_target", 0):
        right = {number: len(set(task.doc_to_target(document))) for number, document in documents.items()}
    return sum(right[number] / choices[number] for number in choices) / len(choices), len(documents)

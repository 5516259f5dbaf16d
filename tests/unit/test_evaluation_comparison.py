"""Differences of two evaluations, and the errors that they have by chance."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from callbacks.evaluation.comparison import compare, other_questions, read_record
from modules.errors import InputError


def record(answers: dict[str, str], **more: Any) -> dict[str, Any]:
    """An evaluation with a group `both` of the tasks a and b, weighted by size, and a task c with a perplexity."""
    results: dict[str, Any] = {}
    for name, marks in {**answers, "both": "".join(answers.values())}.items():
        share = marks.count("1") / len(marks)
        stderr = math.sqrt(share * (1 - share) / (len(marks) - 1))
        results[name] = {"acc": share, "acc_stderr": stderr, "chance": 0.5}
    results["c"] = {"perplexity": 7.0, "f1": None}
    hashes = {"tasks": {name: marks[:0] + "x" for name, marks in answers.items()}}
    right = {name: {"acc": marks} for name, marks in answers.items()}
    return {"results": results, "right": right, "groups": {"both": list(answers)}, "hashes": hashes, **more}


ONE, OTHER = record({"a": "110101", "b": "0111"}), record({"a": "100101", "b": "1101"})


def test_answers_to_the_same_questions_are_paired() -> None:
    found = {(one.task, one.metric): one for one in compare(ONE, OTHER)}
    assert set(found) == {("a", "acc"), ("b", "acc"), ("both", "acc"), ("c", "perplexity")}
    differences = np.array([0, 1, 0, 0, 0, 0])
    assert found["a", "acc"].difference == pytest.approx(1 / 6) and found["a", "acc"].is_paired
    assert found["a", "acc"].stderr == pytest.approx(differences.std(ddof=1) / math.sqrt(6))
    whole = np.array([*differences, -1, 0, 1, 0])
    assert found["both", "acc"].is_paired
    assert found["both", "acc"].stderr == pytest.approx(whole.std(ddof=1) / math.sqrt(10))
    assert found["c", "perplexity"].stderr is None and found["c", "perplexity"].difference == 0


def test_other_questions_are_independent_samples() -> None:
    changed = {**OTHER, "hashes": {"tasks": {"a": "y", "b": "x"}}}
    assert other_questions(ONE, changed) == ["a"]
    found = {one.task: one for one in compare(ONE, changed)}
    errors = [one["results"]["a"]["acc_stderr"] for one in (ONE, OTHER)]
    assert not found["a"].is_paired and found["a"].stderr == pytest.approx(math.hypot(*errors))
    assert found["b"].is_paired and not found["both"].is_paired


def test_a_group_that_weighs_tasks_alike_is_not_paired() -> None:
    results = {**ONE["results"], "both": {"acc": (4 / 6 + 3 / 4) / 2, "acc_stderr": 0.1}}
    found = {one.task: one for one in compare({**ONE, "results": results}, OTHER)}
    assert not found["both"].is_paired and found["both"].stderr is not None


def test_records_of_former_versions_can_be_compared() -> None:
    old = {"results": OTHER["results"]}
    assert [one.is_paired for one in compare(ONE, old)] == [False] * 4


@pytest.mark.parametrize("text", ["", "[]", '{"results": 3}', '{"results": {"a": 1}}', '{"other": {}}'])
def test_a_file_without_results_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"compare=.*x\.json"):
        read_record(path)
    with pytest.raises(InputError, match="No such file"):
        read_record(tmp_path / "nothing.json")
    path.write_text(json.dumps(ONE), encoding="utf-8")
    assert read_record(path)["results"]["a"]["acc"] == pytest.approx(4 / 6)

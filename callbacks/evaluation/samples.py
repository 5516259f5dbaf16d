"""A few questions of each task with the answers that a network gave, for people to read."""

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("task", "question", "answer", "expected", "right")
MAX_LETTERS = 600
"""of a text; of a question its end"""


def examples_of(
    entry: Mapping[str, Any], samples: Mapping[str, Sequence[dict[str, Any]]], number: int
) -> list[dict[str, Any]]:
    """So many questions of what one name stands for, by the names in `COLUMNS`; of a group, from as many of its tasks.

    Args:
        entry: its tasks, as lm-eval has loaded them.
        samples: by task, what lm-eval noted of each document and filter.
        number: of questions.
    """
    tasks = [task for task in entry["tasks"] if samples.get(task)]
    if not tasks or number < 1:
        return []
    step = max(1, len(tasks) // number)
    chosen = tasks[::step][:number]
    quota = -(-number // len(chosen))
    found = []
    for task in chosen:
        first_filter = samples[task][0]["filter"]
        rows = [sample for sample in samples[task] if sample["filter"] == first_filter][:quota]
        found += [_example(task, entry["tasks"][task], row) for row in rows]
    return found[:number]


def _example(name: str, task: Any, sample: Mapping[str, Any]) -> dict[str, Any]:
    arguments, answers = sample["arguments"], sample["filtered_resps"]
    if task.OUTPUT_TYPE == "multiple_choice":
        scores = [answer[0] for answer in answers]
        answer = arguments[scores.index(max(scores))][1]
        target = sample["target"]
        expected = arguments[target][1] if isinstance(target, int) and target < len(arguments) else target
    else:
        answer, expected = answers[0], sample["target"]
        if isinstance(answer, (tuple, list)):  # of a log-likelihood: would it have been written
            answer = f"log-probability {answer[0]:.3f}" if answer else ""
    right = next((sample[key] for key in ("acc", "exact_match", "em", "acc_norm") if key in sample), None)
    texts = (str(arguments[0][0])[-MAX_LETTERS:], str(answer)[:MAX_LETTERS], str(expected)[:MAX_LETTERS])
    return dict(zip(COLUMNS, (name, *texts, None if right is None else float(right)), strict=True))

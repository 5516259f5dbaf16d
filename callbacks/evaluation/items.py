"""The test items of tasks as plain texts."""

from collections.abc import Iterator
from typing import Any

from callbacks.evaluation.tasks import LoadedTasks


def item_documents(tasks: LoadedTasks) -> dict[str, Iterator[Any]]:
    """By task, the rows that it is evaluated on: those of its test split, or of the split that stands in for it."""
    by_task = {name: task for entry in tasks.by_name.values() for name, task in entry["tasks"].items()}
    return {name: iter(task.eval_docs) for name, task in by_task.items()}

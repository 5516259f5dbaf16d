"""`growmoe evaluate CHECKPOINT`: lm-eval tasks on a checkpoint's model."""

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.device import choose_device
from app.outputs import check_new_output
from modules.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from callbacks.eval_tasks import Suite


def evaluate(
    checkpoint: Path,
    tasks: str | list[str] = "synthetic",
    limit: int | float | None = None,
    output: Path | None = None,
    max_batch_tokens: int = 8192,
    device: str = "auto",
) -> None:
    """Evaluate lm-eval tasks on a checkpoint's model, and print a table of the results.

    Args:
        checkpoint: the directory of a checkpoint, such as RUN/checkpoints/step-00000300, or of a Hugging Face model.
        tasks: a suite of configs/eval, or names of lm-eval tasks with commas between them, such as arc_easy,hellaswag.
        limit: documents per task at most; below 1, a share of them.
        output: also write the results to this JSON file, which must not exist yet.
        max_batch_tokens: tokens of one forward pass, padding included; less needs less memory.
        device: where the model runs, such as cpu or cuda; auto takes a GPU if there is one.
    """
    from app.loading import load_model
    from callbacks.eval_tasks import choose_suite, load_tasks

    if output is not None:
        check_new_output(output)
    suite = choose_suite(tasks)
    target = choose_device(device)
    model = load_model(checkpoint)
    if model.tokenizer is None:
        raise InputError(f"{checkpoint} has no tokenizer, and tasks are text; import it again with --tokenizer FILE")
    evaluate_tasks = _import_harness()
    with tempfile.TemporaryDirectory(prefix="growmoe-tasks-") as folder:
        include_path = _write_embedded_tasks(suite, model.metadata, Path(folder)) if suite.embedded else None
        found = evaluate_tasks(
            model.network.to(target),
            model.tokenizer,
            load_tasks(suite, include_path),
            limit=limit,
            max_batch_tokens=max_batch_tokens,
            begin_id=model.begin_ids[0] if model.begin_ids else None,
            end_ids=model.end_ids or None,
        )
    found.pop("headline")
    facts = {key: model.metadata.get(key) for key in ("step", "tokens")}
    record = {"checkpoint": str(checkpoint), **facts, "suite": suite.name, "limit": limit, **found}
    _show(_table(record))
    if output is not None:
        _write(output, record)


def _import_harness() -> Any:
    try:
        from callbacks.harness import evaluate_tasks
    except ImportError as error:
        raise InputError(f"lm-eval cannot be imported ({error}); install it with: pip install lm-eval") from error
    return evaluate_tasks


def _write_embedded_tasks(suite: "Suite", metadata: dict[str, Any], folder: Path) -> Path:
    """The tasks of the world that the checkpoint was trained on, made again from its parameters."""
    from datamodules.world.tasks import write_world_tasks

    world = (metadata.get("data") or {}).get("world")
    if world is None:
        raise InputError(
            f"tasks={suite.name!r} asks about the embedded world, and this checkpoint was not trained on one; "
            "name lm-eval tasks instead, such as --tasks arc_easy"
        )
    write_world_tasks(world, folder)
    return folder


def _table(record: dict[str, Any]) -> "Table":
    """Task, metric, value, standard error, chance level and documents, one line per metric."""
    from rich.table import Table

    from callbacks.eval_results import ACCURACIES

    limit = "" if record["limit"] is None else f", limit {record['limit']}"
    table = Table(title=f"{record['checkpoint']}: {record['suite']}{limit}")
    table.add_column("task")
    table.add_column("metric")
    for name in ("value", "± stderr", "chance", "documents"):
        table.add_column(name, justify="right")
    for task, metrics in record["results"].items():
        chance = metrics.get("chance")
        for key, value in metrics.items():
            name, comma, filter_name = key.partition(",")
            if name == "chance" or name.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{name}_stderr{comma}{filter_name}")
            shown_chance = chance if name in ACCURACIES else None
            cells = [_number(value), _number(stderr), _number(shown_chance), str(record["num_samples"][task])]
            table.add_row(task, key, *cells)
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _show(table: "Table") -> None:
    from rich.console import Console

    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 160  # in a pipe or a file, lines are not cut at 80 columns
    console.print(table)


def _write(output: Path, record: dict[str, Any]) -> None:
    from modules.files import replace_file

    check_new_output(output)  # it may have appeared during the evaluation
    replace_file(output, (json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())

"""`growmoe evaluate CHECKPOINT`: lm-eval tasks on a checkpoint's model."""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from app.device import choose_device
from app.outputs import check_new_output
from modules.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from callbacks.evaluation.suites import Suite


def evaluate(
    checkpoint: Path,
    tasks: str | list[str] = "synthetic",
    limit: int | float | None = None,
    output: Path | None = None,
    compare: Path | None = None,
    data_mirror: Path | None = None,
    missing: Literal["error", "skip"] = "error",
    max_batch_tokens: int = 8192,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Evaluate lm-eval tasks on a checkpoint's model, and print a table of the results.

    A task that fails is told of, and the others go on; the exit code is then 1.

    Args:
        checkpoint: the directory of a checkpoint, such as RUN/checkpoints/step-00000300, or of a Hugging Face model.
        tasks: suites of configs/eval (core_en, mmlu, gsm8k, gsm8k_cot, zh, paper, synthetic) and names of lm-eval
            tasks, with commas between them, such as core_en,cmmlu.
        limit: documents per task at most, the first ones; below 1, a share of them.
        output: also write the results to this JSON file, which must not exist yet.
        compare: results of another model, as --output writes them or as they lie in RUN/eval; also print the
            differences with their standard errors.
        data_mirror: a folder that holds data sets of the hub as <org>/<name>; nothing is then asked of the hub.
        missing: what to do about tasks whose data are not at hand; error names them, skip goes on with the others.
        max_batch_tokens: tokens of one forward pass; less needs less memory.
        device: where the model runs, such as cpu or cuda; auto takes a GPU if there is one.
        dtype: the type of numbers the model computes in.
    """
    import torch

    from app.loading import load_model, text_side
    from callbacks.evaluation.comparison import read_record
    from callbacks.evaluation.suites import choose_suite
    from callbacks.evaluation.tasks import Source, load_tasks

    if output is not None:
        check_new_output(output)
    other = None if compare is None else read_record(compare)
    suite = choose_suite(tasks)
    target = choose_device(device)
    harness_type = _import_harness()
    model = load_model(checkpoint, getattr(torch, dtype))
    text = text_side(model, checkpoint)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="growmoe-tasks-") as folder:
        own = _write_embedded_tasks(suite, model.metadata, Path(folder)) if suite.embedded else None
        loaded = load_tasks(suite, Source(own, None if data_mirror is None else data_mirror.absolute(), missing))
        if loaded.missing:
            sys.stderr.write(
                f"growmoe evaluate: goes without {', '.join(loaded.missing)}: their data are not at hand\n"
            )
        harness = harness_type(loaded, text, limit=limit, max_batch_tokens=max_batch_tokens)
        network = model.network.to(target)
        failed: list[str] = []

        def note(name: str, error: Exception) -> None:  # not the error itself: it holds what was computed
            failed.append(f"growmoe evaluate: {name} failed ({type(error).__name__}: {error})\n")

        with _progress() as on_progress:
            outcome = harness.evaluate(network, on_failure=note, on_progress=on_progress)
    sys.stderr.write("".join(failed))
    if not outcome.results:
        sys.exit(1)
    facts = {key: model.metadata.get(key) for key in ("step", "tokens")}
    record = {"checkpoint": str(checkpoint), **facts, "precision": dtype, **outcome.record()}
    _show(_table(record, _cost(time.perf_counter() - began, target)))
    if other is not None:
        _show(_differences(record, other, str(compare)))
    if output is not None:
        _write(output, record)
    if failed:
        sys.exit(1)


def _import_harness() -> Any:
    try:
        from callbacks.evaluation.harness import Harness
    except ImportError as error:
        raise InputError(f"lm-eval cannot be imported ({error}); install it with: pip install lm-eval") from error
    return Harness


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


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A bar for each task on a terminal; what it is told is a task's name and how much of it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        known: dict[str, Any] = {}

        def advance(name: str, part: float) -> None:
            if name not in known:
                known[name] = bars.add_task(name, total=1.0)
            bars.update(known[name], completed=part)

        yield advance


def _cost(seconds: float, device: Any) -> str:
    """Time and the most memory that was in use."""
    import torch

    most = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    most = most or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{seconds:.0f} s, at most {most / 2**30:.1f} GiB of {'GPU ' if device.type == 'cuda' else ''}memory"


def _table(record: dict[str, Any], cost: str) -> "Table":
    """Task, metric, value, standard error, chance level, documents and shots, one line per metric."""
    from rich.table import Table

    from callbacks.evaluation.results import ACCURACIES

    limit = "" if record["limit"] is None else f", limit {record['limit']}"
    table = Table(title=f"{record['checkpoint']}: {record['suite']}{limit}", caption=cost)
    for name in ("task", "metric"):
        table.add_column(name)
    for name in ("value", "± stderr", "chance", "documents", "shots"):
        table.add_column(name, justify="right")
    for task, metrics in record["results"].items():
        if task in _members(record):
            continue
        chance = metrics.get("chance")
        for key, value in metrics.items():
            name, comma, filter_name = key.partition(",")
            if name == "chance" or name.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{name}_stderr{comma}{filter_name}")
            shown_chance = chance if name in ACCURACIES else None
            counts = [str(record["num_samples"][task]), str(record["num_fewshot"].get(task, ""))]
            table.add_row(task, key, _number(value), _number(stderr), _number(shown_chance), *counts)
    return table


def _differences(record: dict[str, Any], other: dict[str, Any], name: str) -> "Table":
    """Both values, their difference and its standard error, one line per metric."""
    from rich.table import Table

    from callbacks.evaluation.comparison import compare, other_questions

    changed = other_questions(record, other)
    notes = ["paired: over the same questions"]
    if changed:
        notes.append(f"other questions (data, shots, limit or version) in {', '.join(changed[:5])}")
    table = Table(title=f"against {name}", caption="; ".join(notes))
    for column in ("task", "metric"):
        table.add_column(column)
    for column in ("value", "other", "difference", "± stderr", "paired"):
        table.add_column(column, justify="right")
    for one in compare(record, other):
        if one.task not in _members(record):
            sign = f"{one.difference:+.4f}"
            cells = [
                _number(one.value),
                _number(one.other),
                sign,
                _number(one.stderr),
                "yes" if one.is_paired else "no",
            ]
            table.add_row(one.task, one.metric, *cells)
    return table


def _members(record: dict[str, Any]) -> set[str]:
    """Tasks that a group stands for; the file has them."""
    return {task for tasks in record["groups"].values() for task in tasks}


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

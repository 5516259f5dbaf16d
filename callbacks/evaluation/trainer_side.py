"""What an evaluation needs of a trainer, and what it leaves there: files, tables, warnings."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from callbacks.evaluation.samples import COLUMNS
from callbacks.evaluation.tasks import preserved_random_state
from callbacks.warning import warn
from modules.files import replace_file


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, aside first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False).encode())


def beside_transition(path: Path, transition: Mapping[str, Any]) -> dict[str, Any]:
    """The transition's id, and what was found at this step before it; a repeated transition keeps the first answer."""
    fields: dict[str, Any] = {"transition": transition.get("id")}
    if path.exists():
        former = json.loads(path.read_text(encoding="utf-8"))
        repeated = "transition" in former and former["transition"] == fields["transition"]
        before = former.get("before_transition") if repeated else former
        if before is not None:
            fields["before_transition"] = before
    return fields


def has_tables(trainer: pl.Trainer) -> bool:
    """Whether a logger has tables, as that of W&B has."""
    return any(hasattr(logger, "log_table") for logger in trainer.loggers)


def log_examples(trainer: pl.Trainer, examples: Sequence[Mapping[str, Any]]) -> None:
    """Examples for loggers that have tables, as that of W&B has."""
    rows = [[trainer.global_step, *(example[name] for name in COLUMNS)] for example in examples]
    for logger in trainer.loggers:
        log_table = getattr(logger, "log_table", None)
        if log_table is not None and rows:
            log_table("eval/examples", columns=["step", *COLUMNS], data=rows, step=trainer.global_step)


@contextmanager
def trainer_precision(trainer: pl.Trainer) -> Iterator[None]:
    """The trainer's. Where processes share weights out, autocast keeps no casts of those that are gathered: it would
    keep all, and so hold the whole model in each process."""
    with trainer.precision_plugin.forward_context():
        kept = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(kept and trainer.world_size == 1)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(kept)


def lm_eval_is_installed() -> bool:
    """Whether lm-eval can be imported; warns when it cannot."""
    try:
        with preserved_random_state():
            import lm_eval.evaluator  # noqa: F401
    except ImportError as error:
        warn(f"lm-eval cannot be imported ({error}), so evaluation is off; install lm-eval to switch it on")
        return False
    return True

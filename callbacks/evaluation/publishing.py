"""Where results go: files of the run directory, and tables of loggers that have them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from callbacks.evaluation.samples import COLUMNS
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


def log_examples(trainer: pl.Trainer, examples: Sequence[Mapping[str, Any]]) -> None:
    """Examples for loggers that have tables, as that of W&B has."""
    rows = [[trainer.global_step, *(example[name] for name in COLUMNS)] for example in examples]
    for logger in trainer.loggers:
        log_table = getattr(logger, "log_table", None)
        if log_table is not None and rows:
            log_table("eval/examples", columns=["step", *COLUMNS], data=rows, step=trainer.global_step)

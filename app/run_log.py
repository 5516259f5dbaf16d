"""The logger of a run directory: one `metrics.csv` that continues when the run is resumed.

Lightning's CSVLogger starts a new file on resume. This one drops what a resumed run is about to do again, keeping the
old file beside it, and goes on in the same file. `resume_at` does the same for the other logs of the run directory.
"""

import itertools
import os
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from app.metrics_table import FILE_NAME, Row, encode_row, format_number, read_table
from modules.errors import InputError
from modules.files import replace_file, sync_directory, sync_file
from modules.jsonl import append_jsonl, iterate_jsonl

OPEN_ROWS = 4
"""rows at the end of the file that late metrics of their step may still change in place; older ones cost a rewrite"""


class RunLog(Logger):
    """Writes `<run_dir>/metrics.csv`: a column `step`, then the metrics by name; one row per step.

    Metrics that are logged at one step in several calls share its row. A row costs one small write at the end of the
    file; the file is rewritten (aside, fsync, rename) only when a metric appears for the first time. Nothing is read or
    written before the first metric, and only rank 0 touches the disk. Hyper-parameters are in `config.yaml`.
    """

    def __init__(self, run_dir: str | os.PathLike[str], flush_every: int = 1) -> None:
        """Log into `run_dir`; rows reach the file after `flush_every` of them, on `save` and at the end.

        One by one, a killed process loses none; more spare a slow network file system.
        """
        super().__init__()
        if flush_every < 1:
            raise InputError(f"flush_every={flush_every} must be at least 1 row; use 1 to write every row at once")
        self._run_dir = Path(run_dir)
        self._path = self._run_dir / FILE_NAME
        self._flush_every = flush_every
        self._is_open = False
        self._names: list[str] = []  # the columns of the file as it stands
        self._rows: dict[int, Row] = {}  # rows not yet in the file, and the last ones in it
        self._sealed_bytes = 0  # the file up to the rows that may still change
        self._sealed_step = -1
        self._unsaved: set[int] = set()  # steps in _rows that the file lacks

    @property
    def name(self) -> str:
        """Empty: `save_dir` is the run directory itself."""
        return ""

    @property
    def version(self) -> str:
        """Empty: `save_dir` is the run directory itself."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run directory."""
        return str(self._run_dir)

    @property
    def log_dir(self) -> str:
        """The run directory."""
        return str(self._run_dir)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Put metrics into the row of `step` (the last row without one); a later value replaces an earlier one.

        The `epoch` that Lightning adds is left out. Raises TypeError for a value that is not a number, ValueError for a
        name with a line break.
        """
        row = {name: format_number(name, value) for name, value in metrics.items() if name not in ("epoch", "step")}
        broken = [name for name in row if "\n" in name or "\r" in name]
        if broken:
            raise ValueError(f"metric {broken[0]!r} has a line break in its name; a column name is one line: rename it")
        if not row:
            return
        self._open()
        step = max(self._rows, default=max(self._sealed_step, 0)) if step is None else int(step)
        self._rows.setdefault(step, {}).update(row)
        self._unsaved.add(step)
        if len(self._unsaved) >= self._flush_every:
            self._write()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the resolved configuration is in `config.yaml`."""

    @rank_zero_only
    def save(self) -> None:
        """Write what is not yet in the file. Lightning calls this for every row, so it does not wait for the disk."""
        self._write()

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Bring the rows up to a checkpoint to the disk with it."""
        self._write()
        self._sync()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Bring everything to the disk; logging may go on afterwards."""
        self._write()
        self._sync()

    @rank_zero_only
    def resume_at(self, step: int, stage: int | None = None) -> None:
        """Take the logs of the run directory back to a checkpoint, before the first metric of the resumed run.

        `step` and `stage` (the number of transitions applied) are the checkpoint's. See `rewind`.
        """
        self._write()
        rewind(self._run_dir, step, stage)
        self._is_open = False

    def _open(self) -> None:
        """Continue the file that is there, less a torn last line."""
        if self._is_open:
            return
        self._run_dir.mkdir(parents=True, exist_ok=True)
        table = read_table(self._path)
        data = table.to_bytes()
        if self._path.exists() and self._path.read_bytes() != data:
            replace_file(self._path, data)
        self._is_open, self._names, self._rows, self._sealed_step = True, table.names, table.rows, -1
        self._seal(len(data))

    def _write(self) -> None:
        if not self._unsaved:
            return
        names = {name for step in self._unsaved for name in self._rows[step]}
        size = self._path.stat().st_size if self._path.exists() else -1
        if names <= set(self._names) and min(self._unsaved) > self._sealed_step and size >= self._sealed_bytes:
            self._write_end()
        else:
            self._rewrite()
        self._unsaved.clear()

    def _write_end(self) -> None:
        """Write the rows that may have changed, and the new ones, over the end of the file."""
        data = b"".join(encode_row(step, self._rows[step], self._names) for step in sorted(self._rows))
        with self._path.open("r+b") as file:
            file.seek(self._sealed_bytes)
            file.write(data)
            file.truncate()
        self._seal(self._sealed_bytes + len(data))

    def _rewrite(self) -> None:
        """Write the whole file anew, for a new column or a metric of a step long past."""
        table = read_table(self._path)
        for step, row in self._rows.items():
            table.rows.setdefault(step, {}).update(row)
        table.names = sorted({*table.names, *itertools.chain.from_iterable(self._rows.values())})
        data = table.to_bytes()
        replace_file(self._path, data)
        self._names, self._rows = table.names, table.rows
        self._seal(len(data))

    def _seal(self, file_bytes: int) -> None:
        """Forget all rows but the last few, which lie at the end of a file of `file_bytes`."""
        steps = sorted(self._rows)
        if steps[:-OPEN_ROWS]:
            self._sealed_step = steps[-OPEN_ROWS - 1]
        self._rows = {step: self._rows[step] for step in steps[-OPEN_ROWS:]}
        self._sealed_bytes = file_bytes - sum(len(encode_row(s, row, self._names)) for s, row in self._rows.items())

    def _sync(self) -> None:
        if self._path.exists():
            sync_file(self._path)


def rewind(run_dir: Path, step: int, stage: int | None = None) -> None:
    """Drop from the logs of a run what happened after a checkpoint that it is resumed from.

    `metrics.csv` and the logs in JSON Lines lose what is past `step`; a transition, or what was measured behind it, at
    exactly that step stays if the checkpoint is past it, that is if its `stage` is at most the checkpoint's (None: it
    stays). A file
    that loses anything is first kept whole as `<name>.until-step-<its last step>`, under a new name each time. Results
    `eval/step-*.json` of later steps are renamed to end in `.superseded`.
    """

    def is_applied(record: Mapping[str, Any]) -> bool:
        return record.get("step", 0) < step or stage is None or record.get("stage", 0) <= stage

    _rewind_metrics(run_dir / FILE_NAME, step)
    rewind_jsonl(run_dir / "expert_load.jsonl", step)
    rewind_jsonl(run_dir / "language_load.jsonl", step)
    for name in ("transitions.jsonl", "monitor.jsonl"):
        rewind_jsonl(run_dir / name, step, is_applied)
    for path in sorted((run_dir / "eval").glob("step-*.json")):
        number = re.fullmatch(r"step-(\d+)\.json", path.name)
        if number and int(number[1]) > step:
            path.rename(_free_name(path.with_name(f"{path.name}.superseded")))
            sync_directory(path.parent)


def write_history(path: Path, records: list[dict[str, Any]]) -> None:
    """A run in a new directory begins with the transitions that its checkpoint has gone through."""
    if not path.exists():
        for record in records:
            append_jsonl(path, record)


def rewind_jsonl(path: Path, step: int, keep: Callable[[Mapping[str, Any]], bool] = lambda record: True) -> None:
    """Drop the records of a JSON Lines log that are past `step` or that `keep` refuses; keep the old file beside it."""
    records = list(iterate_jsonl(path))
    kept = [line for line, record in records if record.get("step", 0) <= step and keep(record)]
    if len(kept) < len(records):
        _keep_aside(path, max(record.get("step", 0) for _, record in records))
        replace_file(path, b"".join(kept))


def _rewind_metrics(path: Path, step: int) -> None:
    table = read_table(path)
    kept = {number: row for number, row in table.rows.items() if number <= step}
    if len(kept) < len(table.rows):
        _keep_aside(path, max(table.rows))
        table.rows = kept
        replace_file(path, table.to_bytes())


def _keep_aside(path: Path, last_step: int) -> None:
    replace_file(_free_name(path.with_name(f"{path.stem}.until-step-{last_step:08d}{path.suffix}")), path.read_bytes())


def _free_name(path: Path) -> Path:
    """`path`, or the first of `name-2`, `name-3`, ... that does not exist."""
    names = itertools.chain([path], (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(2)))
    return next(name for name in names if not name.exists())

"""JSON Lines logs that survive a crash: one object per line, appended durably, read without a torn last line."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modules.errors import InputError
from modules.files import sync_directory


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record as one line and bring it to the disk before returning.

    A last line that an earlier crash left unfinished is removed first. Tensors and arrays of any shape become numbers
    and lists; a value that is not finite becomes null, because JSON has no word for it. Raises TypeError for a value
    that JSON cannot hold.
    """
    line = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a+b") as file:
        _finish_last_line(file)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync_directory(path.parent)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All records of a log, in order; a file that does not exist has none.

    An unfinished last line (a crash while it was appended) is passed over. Raises InputError for any other line that is
    not a JSON object.
    """
    return [record for _, record in iterate_jsonl(path)]


def iterate_jsonl(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each record of a log beside the bytes of its line (newline included); the same rules as `read_jsonl`."""
    if not path.exists():
        return
    *lines, last = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _parse(line)
        if record is None:
            raise InputError(
                f"{path} line {number} is not a JSON object (it begins with {line[:40]!r}); "
                "each line must hold one object: remove or repair that line"
            )
        yield line + b"\n", record
    record = _parse(last)
    if record is not None:
        yield last + b"\n", record


def _finish_last_line(file: Any) -> None:
    """Remove a torn last line; a last line that is whole but for its newline gets one."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    content = file.read()
    start = content.rfind(b"\n") + 1
    if _parse(content[start:]) is None:
        file.truncate(start)
    else:
        file.write(b"\n")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # covers broken UTF-8 too
        return None
    return record if isinstance(record, dict) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

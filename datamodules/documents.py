"""Reading documents from text, JSONL, parquet and Hub data sets, one at a time, with a reason for each one dropped."""

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import IO, Any, cast

from modules.errors import InputError

HUB = "hub:"
_TEXT, _JSONL, _PARQUET = (".txt", ".text", ".md"), (".jsonl", ".ndjson"), (".parquet",)
_COMPRESSED = ".gz"
_SUFFIXES = ", ".join((*_TEXT, *_JSONL, *_PARQUET))
_PARQUET_ROWS = 256


@dataclass(frozen=True)
class ReadOptions:
    """How documents are found in files.

    Attributes:
        text_column: field of JSONL, parquet and Hub rows that holds the text.
        text_unit: what a document is in a text file: the `file`, a `paragraph` (up to an empty line) or a `line`.
        max_document_bytes: longer documents are dropped, so that one of them cannot fill the memory.
    """

    text_column: str = "text"
    text_unit: str = "file"
    max_document_bytes: int = 16 * 2**20


class Malformed(Exception):
    """A record that is no document; `args[0]` is the reason it is counted under."""


def find_files(location: str) -> list[Path]:
    """The files that a path, folder or glob pattern names, sorted.

    Raises:
        InputError: if there are none, or if a file is of no known kind.
    """
    path = Path(location)
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and _kind(file)]
        unknown = []
    else:
        names = [location] if path.exists() else glob(location, recursive=True) if has_magic(location) else []
        found = [Path(name) for name in names if Path(name).is_file()]
        unknown = [file for file in found if not _kind(file)]
    if not found:
        raise InputError(f"input {location!r} matches no file; give a file, folder or pattern of {_SUFFIXES}")
    if unknown:
        raise InputError(f"input {unknown[0]} has no known kind; known are {_SUFFIXES}, text and JSONL also with .gz")
    return sorted(found)


def read_documents(location: str, options: ReadOptions, dropped: Counter[str]) -> Iterator[str]:
    """The texts of a file, folder, pattern, or Hub data set `hub:ORG/NAME[:CONFIG][@SPLIT]`.

    Args:
        location: where to read.
        options: how to read.
        dropped: counts what was left out, by reason: `empty`, `NUL`, `invalid UTF-8`, `too long`, `malformed`.
    """
    records = _read_hub(location, options) if location.startswith(HUB) else _read_files(location, options)
    for record in records:
        try:
            yield _clean(record, options)
        except Malformed as error:
            dropped[error.args[0]] += 1


def _clean(record: Any, options: ReadOptions) -> str:
    """The text of a record, or Malformed with the reason to drop it."""
    if isinstance(record, Malformed):
        raise record
    if isinstance(record, str):
        try:
            record = record.encode()
        except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
            raise Malformed("invalid UTF-8") from None
    if not isinstance(record, bytes):
        raise Malformed("empty" if record is None else "malformed")
    if len(record) > options.max_document_bytes:
        raise Malformed("too long")
    if b"\0" in record:
        raise Malformed("NUL")
    try:
        text = record.decode()
    except UnicodeDecodeError:
        raise Malformed("invalid UTF-8") from None
    if not text.strip():
        raise Malformed("empty")
    return text


def _kind(path: Path) -> str:
    """`text`, `jsonl`, `parquet`, or nothing."""
    suffixes = path.suffixes
    compressed = bool(suffixes) and suffixes[-1] == _COMPRESSED
    suffix = suffixes[-2] if compressed and len(suffixes) > 1 else path.suffix
    if suffix in _PARQUET:
        return "" if compressed else "parquet"
    return "text" if suffix in _TEXT else "jsonl" if suffix in _JSONL else ""


def _read_files(location: str, options: ReadOptions) -> Iterator[Any]:
    readers = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
    for path in find_files(location):
        try:
            yield from readers[_kind(path)](path, options)
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise InputError(f"input {path} cannot be read: {reason}; repair it or leave it out") from None


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    with gzip.open(path) if path.suffix == _COMPRESSED else path.open("rb") as file:
        yield cast(IO[bytes], file)


def _read_text(path: Path, options: ReadOptions) -> Iterator[Any]:
    with _open(path) as file:
        if options.text_unit == "file":
            yield file.read(options.max_document_bytes + 1)
            return
        paragraph: list[bytes] = []
        for line in _lines(file, options):
            if options.text_unit == "line" or isinstance(line, Malformed):
                yield line
            elif line.strip():
                paragraph.append(line)
            elif paragraph:
                yield b"".join(paragraph)
                paragraph = []
        if paragraph:
            yield b"".join(paragraph)


def _lines(file: IO[bytes], options: ReadOptions) -> Iterator[Any]:
    """The lines of a file; of one that is too long only the fact."""
    limit = options.max_document_bytes + 1
    while line := file.readline(limit):
        if len(line) < limit or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(limit)
        yield Malformed("too long")


def _read_jsonl(path: Path, options: ReadOptions) -> Iterator[Any]:
    with _open(path) as file:
        for number, line in enumerate(_lines(file, options), start=1):
            if isinstance(line, Malformed):
                yield line
                continue
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                yield Malformed("invalid UTF-8")
                continue
            except ValueError:
                yield Malformed("malformed")
                continue
            if not isinstance(row, dict):
                yield Malformed("malformed")
            elif options.text_column not in row:
                raise _no_column(f"{path} line {number}", options, list(row))
            else:
                yield row[options.text_column]


def _read_parquet(path: Path, options: ReadOptions) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if options.text_column not in file.schema_arrow.names:
                raise _no_column(str(path), options, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[options.text_column]):
                column = batch.column(0)
                if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
                    raise InputError(f"input {path}: column {options.text_column!r} is {column.type}, not text")
                # as bytes: Arrow does not promise that its strings are valid
                yield from column.cast(pa.large_binary()).to_pylist()
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"input {path} cannot be read: {reason}; repair it or leave it out") from None


def _read_hub(location: str, options: ReadOptions) -> Iterator[Any]:
    import datasets

    name, _, split = location.removeprefix(HUB).partition("@")
    name, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            if options.text_column not in row:
                raise _no_column(location, options, list(row))
            yield row[options.text_column]
    except InputError:
        raise
    except Exception as error:  # whatever the Hub, the network or a builder raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"Hub data set {location!r} cannot be read: {reason}; check name, config, split and network"
        ) from None


def _no_column(where: str, options: ReadOptions, columns: list[str]) -> InputError:
    found = ", ".join(map(str, columns))
    return InputError(f"input {where} has no column {options.text_column!r}, only {found}; set text_column")

"""Prompts in files, and the file that their continuations go to."""

import json
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from app.outputs import check_new_output
from modules.errors import InputError
from modules.files import sync_directory


@dataclass(frozen=True)
class Prompt:
    """A text to continue; `where` begins the message when something is wrong with it, and may be empty."""

    text: str
    where: str

    def __post_init__(self) -> None:
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{self.where}the prompt holds {self.text[error.start]!r}, which is half a character; "
                "write it in UTF-8, and characters beyond \\uffff in JSON as pairs"
            ) from None


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: each line of a .txt that is not empty, or "prompt" of each object of a .jsonl.

    Raises:
        InputError: no such file, another kind, not UTF-8, a line that is no such object, or no prompt at all.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(f"prompts={path} is neither .txt nor .jsonl; name it after what it holds")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"prompts={path} cannot be read: {error.strerror}; give a file of prompts") from None
    except UnicodeDecodeError as error:
        raise InputError(f"prompts={path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
    numbered = [(f"{path} line {number}: ", line) for number, line in enumerate(lines, start=1)]
    kept = [(where, line) for where, line in numbered if line.strip()]
    if not kept:
        raise InputError(f"prompts={path} is empty; write one prompt on each line")
    if path.suffix == ".txt":
        return [Prompt(line, where) for where, line in kept]
    return [Prompt(_prompt_of(line, where), where) for where, line in kept]


def _prompt_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f'{where}not JSON ({error}); write {{"prompt": "…"}}') from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise InputError(f'{where}{line[:40]!r} is no object with a text under "prompt"; write {{"prompt": "…"}}')
    return record["prompt"]


@contextmanager
def new_file(path: Path | None) -> Iterator[IO[str]]:
    """A file to write to, which has its name when it is whole; standard output when there is no path.

    Raises:
        InputError: `path` is there already, also when it came up in the meantime.
    """
    if path is None:
        yield sys.stdout
        return
    check_new_output(path)
    aside = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with aside.open("x", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check_new_output(path)
        aside.rename(path)
        sync_directory(path.parent)
    finally:
        aside.unlink(missing_ok=True)

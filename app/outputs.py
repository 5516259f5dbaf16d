"""Whether a result can be written where it is asked for: checked before anything is computed."""

import os
from pathlib import Path

from modules.errors import InputError

_LONGEST_NAME = 255 - len(".tmp-00000000")


def check_new_output(output: Path) -> None:
    """Raise `InputError` unless `output` is a free name in a folder that can be written to."""
    folder = output.parent
    if os.path.lexists(output):
        raise InputError(f"output={output} exists, and nothing is ever overwritten; choose another name or move it")
    if not folder.is_dir():
        raise InputError(f"output={output} lies in a folder that does not exist; create {folder} first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"output={output} lies in a folder that cannot be written to; choose another one")
    size = len(output.name.encode())
    if size > _LONGEST_NAME:
        raise InputError(f"output has a name of {size} bytes, and at most {_LONGEST_NAME} are possible; shorten it")


def check_report(path: Path, option: str, endings: tuple[str, ...], mark: str = "growmoe report") -> None:
    """Raise `InputError` for a page or picture that is not named like one, or is in the way of what someone else wrote.

    Args:
        mark: what our own files have near their beginning: they may be written anew.
    """
    if path.suffix.lower() not in endings:
        raise InputError(
            f"{option}={path} does not end in {endings[0]}; the file is written as {endings[0]}: rename it"
        )
    if not path.parent.is_dir():
        raise InputError(f"{option}={path} lies in a folder that does not exist; create {path.parent} first")
    if path.is_dir():
        raise InputError(f"{option}={path} is a folder; give the name of a file")
    if path.exists():
        with path.open("rb") as file:
            if mark.encode() not in file.read(4096):
                raise InputError(
                    f"{option}={path} exists and is not a {mark}, so it stays; choose another name or move it"
                )

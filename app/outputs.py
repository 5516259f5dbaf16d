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

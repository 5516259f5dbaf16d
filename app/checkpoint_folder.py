"""The checkpoints of a run: a folder of directories `step-NNNNNNNN`, and `step-NNNNNNNN-stage-K` at transitions."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from app.checkpoint import verify
from modules.config import MANIFEST
from modules.errors import InputError

_NAME = re.compile(r"step-(\d+)(?:-stage-(\d+))?")


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoint directories with a manifest, oldest first."""
    found = [path for path in _directories(directory) if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: _order(path.name))


def supersede_later(chosen: Path) -> None:
    """Rename the checkpoints of the folder that come after `chosen`, from which a run is about to go another way.

    They stay on the disk as `NAME.superseded`, out of the way of the new ones, and `newest_valid` does not see them.
    """
    later = list_checkpoints(chosen.parent)
    for path in later[later.index(chosen) + 1 :]:
        aside, number = path.with_name(f"{path.name}.superseded"), 2
        while aside.exists():
            aside, number = path.with_name(f"{path.name}.superseded-{number}"), number + 1
        path.rename(aside)


def remove_unfinished(directory: Path) -> None:
    """Delete what saves that were killed have left of checkpoints. Only the run that writes there may do so."""
    for path in _directories(directory):
        name, _, rest = path.name.partition(".tmp-")
        if rest and _NAME.fullmatch(name):
            shutil.rmtree(path, ignore_errors=True)


def newest_valid(directory: Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint that verifies, and the damaged ones that were passed over."""
    damaged = []
    for path in reversed(list_checkpoints(directory)):
        try:
            verify(path)
        except InputError:
            damaged.append(path)
        else:
            return path, damaged
    return None, damaged


def _directories(directory: Path) -> Iterator[Path]:
    return (path for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else iter(())


def _order(name: str) -> tuple[int, int]:
    """Step and stage; a regular checkpoint comes before the transition at its step."""
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1]), int(match[2] or -1)

"""Files that a crash cannot tear: written beside their name, brought to the disk, then renamed."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Give `path` the content `data` in one step: written beside it, fsynced, then renamed over it.

    A crash at any instant leaves either the old or the new content under the name.
    """
    aside = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with open(aside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_directory(path.parent)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory that is complete or not there: yields one beside `path` to fill, brings it to the disk, and renames
    it. Where filling it fails nothing stays."""
    aside = directory_beside(path)
    try:
        yield aside
        publish_directory(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def directory_beside(path: Path) -> Path:
    """A new directory, whose name says for which one it is filled."""
    aside = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    aside.mkdir(parents=True)
    return aside


def publish_directory(aside: Path, path: Path) -> None:
    """Bring the files of a directory to the disk, and give it its name."""
    for file in sorted(aside.iterdir()):
        sync_file(file)
    sync_directory(aside)
    aside.rename(path)
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Bring a finished file to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Bring the names in a directory (new files, renames) to the disk, where the file system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems refuse it for directories
    finally:
        os.close(descriptor)

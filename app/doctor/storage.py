"""The file system of a run directory: whether checkpoints can be written there for good, and read by every rank."""

import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import torch.distributed as dist

from app.doctor.findings import Problem, Section
from modules.files import sync_directory, sync_file

LITTLE_SPACE = 2**30
SLOW_SYNC_SECONDS = 1.0
VISIBLE_SECONDS = 5.0
"""Network file systems may show a new file late."""
PASSING = ("tmpfs", "ramfs", "overlay")
"""File systems in memory, or of a container."""


def check_storage(run_dir: Path, ranks: int, rank: int) -> Section:
    """Write, sync, rename and read a file in the nearest folder that exists; all ranks together. Nothing stays."""
    section = Section("Files", ("what", "is"))
    folder = _nearest(run_dir)
    mark = folder / f".growmoe-doctor-{_from_first(uuid.uuid4().hex)}"
    failure, seconds = _write(mark) if rank == 0 else ("", 0.0)
    failure = _from_first(failure)
    sees = not failure and _sees(mark)
    blind = [number for number, visible in enumerate(_of_all(sees, ranks)) if not visible]
    if rank == 0:
        mark.unlink(missing_ok=True)
    section.rows.append(("run directory", str(run_dir) + ("" if folder == run_dir else f", to be made in {folder}")))
    if failure:
        fix = "choose another trainer.default_root_dir, or give this user the right to write there"
        section.problems.append(Problem(f"no file can be written in {folder}: {failure}", fix))
        return section
    section.rows.append(("write, sync, rename", f"{1000 * seconds:.1f} ms"))
    if seconds > SLOW_SYNC_SECONDS:
        fix = "expect slow checkpoints; raise checkpoint.every_n_steps or choose another file system"
        section.problems.append(Problem(f"a small file takes {seconds:.1f} s to be on the disk", fix, False))
    if ranks > 1:
        section.rows.append(("seen by", "all ranks" if not blind else f"all ranks but {blind}"))
    if blind:
        fix = "put trainer.default_root_dir on a file system that every host mounts under the same path"
        section.problems.append(Problem(f"ranks {blind} do not see a file that rank 0 wrote in {folder}", fix))
    _look_at_space(section, folder)
    return section


def _look_at_space(section: Section, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    kind = _kind(folder)
    section.rows.append(("free", f"{free / 2**30:,.1f} GiB ({kind})"))
    if free < LITTLE_SPACE:
        fix = "free some, or lower checkpoint.keep_last; growmoe plan tells the size of a checkpoint's parameters"
        section.problems.append(Problem(f"{folder} has {free / 2**20:,.0f} MiB left", fix))
    if kind in PASSING:
        fix = "mount a volume there, or choose another trainer.default_root_dir"
        section.problems.append(
            Problem(f"{folder} is {kind}: what is there goes with the machine or container", fix, False)
        )


def _nearest(path: Path) -> Path:
    """The path, or the folder that exists on the way to it."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _write(mark: Path) -> tuple[str, float]:
    """What went wrong, empty if nothing did, and how long it took: the way of every checkpoint."""
    aside = mark.with_name(mark.name + ".tmp")
    started = time.perf_counter()
    try:
        aside.write_bytes(mark.name.encode())
        sync_file(aside)
        aside.rename(mark)
        sync_directory(mark.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
        return error.strerror or str(error), 0.0
    return "", time.perf_counter() - started


def _sees(mark: Path) -> bool:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while time.monotonic() < deadline:
        try:
            if mark.read_bytes() == mark.name.encode():
                return True
        except OSError:
            time.sleep(0.1)
    return False


def _kind(folder: Path) -> str:
    """The type of the file system, from the longest mount point that leads to the folder."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return "unknown"
    found = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    leading = [(point, kind) for point, kind in found if os.path.commonpath([point, folder.resolve()]) == point]
    return max(leading, key=lambda entry: len(entry[0]), default=("", "unknown"))[1]


def _from_first(value: Any) -> Any:
    """What rank 0 has."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _of_all(value: bool, ranks: int) -> list[bool]:
    """By rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * ranks
    dist.all_gather_object(values, value)
    return values

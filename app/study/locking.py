"""Locks between processes that work on one study; they end with the process that holds them."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(path: Path, is_waiting: bool = True) -> Iterator[bool]:
    """Keep other processes from a lock for the time of the context.

    Yields:
        Whether it is ours: not where another process has it and nobody wants to wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if is_waiting else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True

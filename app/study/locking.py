"""Locks between processes that work on one study; they end with those that hold them, children included."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[bool]:
    """Keep other processes from a lock for the time of the context.

    Args:
        path: the lock's file.
        waiting: told before this process waits for another one; without it nobody waits.

    Yields:
        Whether it is ours.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                yield False
                return
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield True

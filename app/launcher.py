"""The processes that `fit --trainer.devices N` starts on this machine: they live and end together."""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

PARENT = "GROWMOE_PARENT"
"""Names the process that started this one, to this one."""
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a run that a signal has stopped: a checkpoint is saved."""
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 60


class Launcher(_SubprocessScriptLauncher):
    """Lightning's, which starts the same command once more for every further device, with an end of its own.

    Lightning kills the main process with SIGKILL when another one fails, so that its exit code tells nothing, does so
    also when that one was stopped by a signal like itself, and does not wait for those that are still at work.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Run a function here and in the processes to be started; they have ended when this one has."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        _set_num_threads_if_needed(num_processes=self.num_processes)  # before the others start: they inherit it
        os.environ[PARENT] = str(os.getpid())
        self._call_children_scripts()
        del os.environ[PARENT]
        self._is_failing = False
        threading.Thread(target=self._watch, args=(trainer,), daemon=True, name="children").start()
        try:
            result = function(*args, **kwargs)
        except BaseException:
            self._is_failing = True  # this process ends by itself, and the others with it
            raise
        atexit.register(self._wait)
        return result

    def _wait(self) -> None:
        """Let the others come to their end, which is not far."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while any(child.poll() is None for child in self.procs) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def _watch(self, trainer: pl.Trainer) -> None:
        """End this process, which may wait for a dead one for good, with the exit code of the first one that failed."""
        while not self._is_failing:
            codes = [child.poll() for child in self.procs]
            failed = [code for code in codes if code and not (code in STOPPED and trainer.should_stop)]
            if failed:
                rank = codes.index(failed[0]) + 1
                sys.stderr.write(f"growmoe: process {rank} ended with {failed[0]}; the others end with it\n")
                sys.stderr.flush()
                os._exit(failed[0] if failed[0] > 0 else 1)
            if None not in codes:
                return
            time.sleep(POLL_SECONDS)


def follow_parent() -> None:
    """In a process that `Launcher` started: end when the one that started it ends, however that happens."""
    if os.environ.get(PARENT) == str(os.getppid()):
        _prctl_pr_set_pdeathsig(signal.SIGKILL)
        if os.environ[PARENT] != str(os.getppid()):  # it ended meanwhile
            os._exit(1)


@contextmanager
def parting() -> Iterator[None]:
    """Behind a run, leave the other processes, all at the same time: launchers that see one gone may end the rest.

    A group that was there before the run is its maker's to leave. Where a run fails, the others are not waited for.
    """
    is_ours = not torch.distributed.is_initialized()
    try:
        yield
    except SystemExit as end:
        if end.code in STOPPED and is_ours:
            _part()
        raise
    if is_ours:
        _part()


def _part() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()  # its threads abort a process that ends with them running

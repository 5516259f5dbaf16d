"""The processes in which a study measures and trains: one `growmoe` command each, with a log of its own."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

from app.launcher import PARENT, STOPPED
from modules.errors import InputError


class ChildFailed(RuntimeError):
    """A command ended with an error that is not the input's."""


def run_command(arguments: Sequence[str], log: Path, launcher: str = "") -> None:
    """Run `growmoe ARGUMENTS` to its end.

    It ends with this process: a signal is handed on once, so that a run saves first, and nothing goes on behind a kill.
    Until then it holds the locks that this process has.

    Args:
        log: what it prints is appended here.
        launcher: what starts `-m app`, such as "torchrun --nproc_per_node 8"; this Python when empty.

    Raises:
        InputError: the command found its input wrong, with its own line; there is no such launcher.
        ChildFailed: it failed.
        SystemExit: it was stopped by a signal.
    """
    command = [*(shlex.split(launcher) or [sys.executable]), "-m", "app", *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        begin = output.tell()
        try:
            child = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, PARENT: str(os.getpid())},
                close_fds=False,  # locks are held as long as anybody has them
                start_new_session=True,  # Ctrl-C reaches this process alone
                preexec_fn=_end_with_parent,
            )
        except OSError as error:
            raise InputError(
                f"launcher={launcher!r} cannot be started ({error}); leave it out, or correct it"
            ) from None
        try:
            code = child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
    if code in STOPPED:
        sys.exit(code)
    if code != 0:
        raise _failure(log.read_bytes()[begin:].decode(errors="replace"), code, log)


def _end_with_parent() -> None:
    """A launcher is told to end where this process is killed; a process of ours sees to that itself."""
    _prctl_pr_set_pdeathsig(signal.SIGTERM)


def _failure(printed: str, code: int, log: Path) -> Exception:
    """What the command said: its own line where its input was wrong, which a launcher may have buried."""
    lines = printed.strip().splitlines() or ["it printed nothing"]
    own = [line.partition(": ")[2] for line in lines if line.startswith("growmoe") and ": " in line]
    if code == 2 or (own and re.search(r"exitcode *: 2\b", printed)):
        return InputError(own[-1] if own else lines[-1])
    return ChildFailed(f"{lines[-1].strip()} (exit code {code}; see {log})")

"""The processes in which a study measures and trains: one `growmoe` command each, with a log of its own."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from app.launcher import PARENT, STOPPED
from modules.errors import InputError


class ChildFailed(RuntimeError):
    """A command ended with an error that is not the input's."""


def run_command(arguments: Sequence[str], log: Path, launcher: str = "") -> None:
    """Run `growmoe ARGUMENTS` to its end.

    It ends with this process: a signal is handed on, so that a run saves first, and nothing goes on behind a kill.

    Args:
        log: what it prints is appended here.
        launcher: what starts `-m app`, such as "torchrun --nproc_per_node 8"; this Python when empty.

    Raises:
        InputError: the command found its input wrong; with its own line.
        ChildFailed: it failed.
        SystemExit: it was stopped by a signal.
    """
    command = [*(shlex.split(launcher) or [sys.executable]), "-m", "app", *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        begin = output.tell()
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, PARENT: str(os.getpid())}
        )
        try:
            code = child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
    if code in STOPPED:
        sys.exit(code)
    if code == 0:
        return
    lines = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
    last = lines[-1].split(": ", 1)[-1] if lines else "it printed nothing"
    if code == 2:
        raise InputError(last)
    raise ChildFailed(f"{last} (exit code {code}; see {log})")

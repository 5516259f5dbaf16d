"""The processes that a study starts: they hear of one signal, end with it, and hold its locks until then."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.study.children import ChildFailed, run_command
from app.study.locking import held
from modules.errors import InputError

STUB = """
import os, signal, sys, time
folder, seen = sys.argv[1], []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: seen.append(signal.Signals(number).name))
open(f"{folder}/pid", "w").write(f"{os.getpid()} {os.getsid(0)}")
while not seen:
    time.sleep(0.02)
time.sleep(1.0)  # a step is finished and a checkpoint saved
open(f"{folder}/seen", "w").write(" ".join(seen))
sys.exit(143)
"""
PARENT = """
import sys
from pathlib import Path
from app.study.children import run_command
from app.study.locking import held
folder = Path(sys.argv[1])
with held(folder / "lock"):
    run_command(["fit"], folder / "log", sys.argv[2])
"""


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def launcher_in(folder: Path, text: str) -> str:
    """A program in the place of `python -m app`."""
    path = folder / "stub.py"
    path.write_text(text)
    return f"{sys.executable} {path} {folder}"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Workers of pytest-xdist ignore Ctrl-C."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_reaches_a_run_as_one_signal(tmp_path: Path) -> None:
    """A terminal sends it to a whole session: the run is in another one, and told by the study."""

    def interrupt() -> None:
        wait_for((tmp_path / "pid").exists)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=interrupt)
    sender.start()
    with pytest.raises(KeyboardInterrupt):
        run_command(["fit"], tmp_path / "log", launcher_in(tmp_path, STUB))
    sender.join()
    assert (tmp_path / "seen").read_text() == "SIGTERM", "it was waited for, and heard of it once"
    assert int((tmp_path / "pid").read_text().split()[1]) != os.getsid(0)


def test_nothing_goes_on_behind_a_kill_and_until_then_the_lock_is_held(tmp_path: Path) -> None:
    words = [str(tmp_path), launcher_in(tmp_path, STUB)]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *words], cwd=Path(__file__).parents[2])
    wait_for((tmp_path / "pid").exists)
    parent.kill()
    parent.wait()
    with held(tmp_path / "lock") as is_ours:
        assert not is_ours, "the run still saves"
    wait_for((tmp_path / "seen").exists, 10)
    time.sleep(0.3)
    with held(tmp_path / "lock") as is_ours:
        assert is_ours


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        ("import sys; sys.exit('growmoe fit: model.dim=0 must be at least 1')", ChildFailed, "exit code 1"),
        ("import sys; print('growmoe fit: a=0 is too small'); sys.exit(2)", InputError, "^a=0 is too small$"),
        ("print('growmoe fit: a=0 is no b'); print(' exitcode  : 2 (pid 7)'); raise SystemExit(1)", InputError, "^a=0"),
        ("raise RuntimeError('it broke')", ChildFailed, r"RuntimeError: it broke \(exit code 1; see .*log\)"),
        ("raise SystemExit(3)", ChildFailed, "it printed nothing"),
    ],
)
def test_what_a_command_says(text: str, kind: type[Exception], told: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("growmoe fit: from an earlier time\n")
    with pytest.raises(kind, match=told):
        run_command(["fit"], tmp_path / "log", launcher_in(tmp_path, text))


def test_a_launcher_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="launcher='no_such_program' cannot be started"):
        run_command(["fit"], tmp_path / "log", "no_such_program")


def test_a_stopped_run_stops_the_study(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        run_command(["fit"], tmp_path / "log", launcher_in(tmp_path, "raise SystemExit(143)"))
    assert end.value.code == 143

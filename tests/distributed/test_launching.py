"""Two processes, started by growmoe itself and by torchrun: they train, stop and fail together, and none stays behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from app.checkpoint import list_checkpoints, read_metadata
from tests.end_to_end import runs

ROOT = Path(__file__).resolve().parents[2]
PYTHON = [sys.executable, "-m"]
ITSELF = [*PYTHON, "app", "fit", "--trainer.devices", "2"]
SCRIPT = [str(Path(sys.executable).with_name("growmoe")), "fit", "--trainer.devices", "2"]
TORCHRUN = [*PYTHON, "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "app", "fit"]
TORCHRUN += ["--trainer.devices", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worlds")


def plain(tmp_path: Path, world: Path, max_steps: int, val_samples: int = 4) -> tuple[Path, Path]:
    """The file of a configuration that does not grow, and its run directory."""
    config: dict[str, Any] = runs.settings(tmp_path / "run", world, max_steps=max_steps)
    config["growth"]["stages"] = None
    config["data"]["init_args"]["val_samples"] = val_samples
    return runs.write(config, tmp_path / "config.yaml"), tmp_path / "run"


def members(config: Path) -> dict[int, str]:
    """The processes of a run, by number; with the LOCAL_RANK of each, empty for one that has none."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(config).encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                variables = dict(v.split(b"=", 1) for v in (folder / "environ").read_bytes().split(b"\0") if b"=" in v)
                found[int(folder.name)] = variables.get(b"LOCAL_RANK", b"").decode()
        except OSError:
            continue  # it has ended
    return found


@contextmanager
def training(command: list[str], config: Path, run_dir: Path, step: int) -> Iterator[subprocess.Popen[str]]:
    """A run that has finished a step. Behind it, nothing of it is left."""
    run = subprocess.Popen(
        [*command, "--config", str(config)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 240
        while not (run_dir / "metrics.csv").exists() or max(runs.losses(run_dir), default=0) < step:
            assert run.poll() is None and time.monotonic() < deadline, run.communicate()[1]
            time.sleep(0.02)
        yield run
        time.sleep(0.5)
        assert not members(config)
    finally:
        for number in members(config):
            os.kill(number, signal.SIGKILL)
        run.wait()


def saved_last_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, which is the last one trained."""
    newest = read_metadata(list_checkpoints(run_dir / "checkpoints")[-1])
    assert newest["step"] == max(runs.losses(run_dir))
    return newest["step"]


@pytest.mark.parametrize("command", [ITSELF, SCRIPT], ids=["module", "script"])
def test_processes_that_growmoe_starts(command: list[str], world: Path, tmp_path: Path) -> None:
    config, run_dir = plain(tmp_path, world, max_steps=4)
    with training(command, config, run_dir, step=4) as run:
        _, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert saved_last_step(run_dir) == 4 and "Traceback" not in errors
    assert "process_group" not in errors and "terminate called" not in errors


@pytest.mark.parametrize("told", ["all", "0", "1"])
@pytest.mark.parametrize("command", [ITSELF, TORCHRUN], ids=["itself", "torchrun"])
def test_one_signal_stops_all(command: list[str], told: str, world: Path, tmp_path: Path) -> None:
    config, run_dir = plain(tmp_path, world, max_steps=4000)
    with training(command, config, run_dir, step=3) as run:
        for number, rank in members(config).items():
            is_told = number == run.pid if told == "all" else rank == told or (rank == "" and command is ITSELF)
            if is_told:
                os.kill(number, signal.SIGTERM)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == (143 if command is ITSELF else 1), errors  # torchrun has a code of its own
    assert saved_last_step(run_dir) < 4000
    assert errors.count("stopped by SIGTERM after a checkpoint") == 2, errors


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_death_ends_all(rank: str, world: Path, tmp_path: Path) -> None:
    config, run_dir = plain(tmp_path, world, max_steps=4000)
    with training(ITSELF, config, run_dir, step=3) as run:
        (victim,) = (n for n, r in members(config).items() if (r == "1") == (rank == "1"))
        os.kill(victim, signal.SIGKILL)
        _, errors = run.communicate(timeout=30)
    assert run.returncode == (1 if rank == "1" else -signal.SIGKILL), errors


@pytest.mark.parametrize("command", [[*PYTHON, "app", "fit"], ITSELF], ids=["one", "two"])
def test_a_signal_in_a_validation(command: list[str], world: Path, tmp_path: Path) -> None:
    config, run_dir = plain(tmp_path, world, max_steps=4000, val_samples=4000)
    with training(command, config, run_dir, step=4) as run:
        time.sleep(0.3)
        run.send_signal(signal.SIGTERM)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 143, errors
    assert saved_last_step(run_dir) == 5
    assert not any(name.startswith("val/") for row in runs.metrics(run_dir).values() for name in row)

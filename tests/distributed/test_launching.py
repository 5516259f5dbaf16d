"""Two processes, started by growmoe or by torchrun: they train, stop and fail together, and none stays behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from app.checkpoint import read_metadata
from app.checkpoint_folder import list_checkpoints
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


def plain(tmp_path: Path, world: Path, max_steps: int, **trainer: Any) -> tuple[Path, Path]:
    """The file of a configuration that does not grow, and its run directory."""
    config: dict[str, Any] = runs.settings(tmp_path / "run", world, max_steps=max_steps, **trainer)
    config["growth"]["stages"] = None
    config["data"]["init_args"]["val_samples"] = 16
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
def training(
    command: list[str], config: Path, run_dir: Path, step: int, environment: dict[str, str] = ENVIRONMENT
) -> Iterator[subprocess.Popen[str]]:
    """A run that has finished a step. Behind it, nothing of it is left."""
    run = subprocess.Popen(
        [*command, *([] if "--config" in command else ["--config", str(config)])],
        cwd=ROOT,
        env=environment,
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


@pytest.mark.parametrize(
    ("command", "told"),
    [(ITSELF, "launcher"), (ITSELF, "1"), (TORCHRUN, "launcher"), (TORCHRUN, "0"), (TORCHRUN, "1")],
    ids=["itself", "itself, second", "torchrun", "torchrun, first", "torchrun, second"],
)
def test_one_signal_stops_all(command: list[str], told: str, world: Path, tmp_path: Path) -> None:
    config, run_dir = plain(tmp_path, world, max_steps=4000)
    with training(command, config, run_dir, step=3) as run:
        (process,) = [run.pid] if told == "launcher" else [n for n, rank in members(config).items() if rank == told]
        os.kill(process, signal.SIGTERM)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == (143 if command is ITSELF else 1), errors  # torchrun has a code of its own
    assert saved_last_step(run_dir) < 4000
    assert errors.count("stopped by SIGTERM after a checkpoint") == 1, errors  # the first process tells


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_death_ends_all(rank: str, world: Path, tmp_path: Path) -> None:
    config, run_dir = plain(tmp_path, world, max_steps=4000)
    with training(ITSELF, config, run_dir, step=3) as run:
        (victim,) = (n for n, r in members(config).items() if (r == "1") == (rank == "1"))
        os.kill(victim, signal.SIGKILL)
        _, errors = run.communicate(timeout=30)
    assert run.returncode == (1 if rank == "1" else -signal.SIGKILL), errors


@pytest.mark.parametrize(
    ("command", "rank"), [([*PYTHON, "app", "fit"], 0), (ITSELF, 1)], ids=["one process", "second of two"]
)
def test_a_signal_in_a_validation(command: list[str], rank: int, world: Path, tmp_path: Path) -> None:
    callback = {"class_path": "tests.distributed.interrupting.Interrupt", "init_args": {"rank": rank}}
    config, run_dir = plain(tmp_path, world, max_steps=4000, callbacks=[callback])
    with training(command, config, run_dir, step=4) as run:
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 143, errors
    assert saved_last_step(run_dir) == 5  # that of step 4 is given up
    assert not any(name.startswith("val/") for row in runs.metrics(run_dir).values() for name in row)


def test_two_nodes_stop_and_resume(world: Path, tmp_path: Path) -> None:
    config, run_dir = plain(tmp_path, world, max_steps=4000)
    command = [*PYTHON, "app", "fit", "--config", str(config), "--ckpt_path", "auto", "--trainer.num_nodes", "2"]
    command += ["--trainer.devices", "1"]
    for told in (1, 0):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        before = max(runs.losses(run_dir), default=0) if run_dir.exists() else 0
        environment = {**ENVIRONMENT, **meeting, "NODE_RANK": "1"}
        other = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        environment = {**ENVIRONMENT, **meeting, "NODE_RANK": "0"}
        with training(command, config, run_dir, before + 3, environment) as run:
            (run, other)[told].send_signal(signal.SIGTERM)
            assert (run.wait(60), other.wait(60)) == (143, 143)
        assert saved_last_step(run_dir) >= before + 3
    assert sorted(runs.losses(run_dir)) == list(range(1, saved_last_step(run_dir) + 1))


def test_rays_way(world: Path, tmp_path: Path) -> None:
    """The processes have met, and the command line runs in a thread, where signals cannot be taken."""
    config, run_dir = plain(tmp_path, world, max_steps=4)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [*PYTHON, "tests.distributed.rays_worker", "fit", "--config", str(config)]
        ranks.append(subprocess.Popen(command, cwd=ROOT, env={**ENVIRONMENT, **variables}, stdout=subprocess.DEVNULL))
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    assert saved_last_step(run_dir) == 4

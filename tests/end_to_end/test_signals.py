"""A signal in the middle of a run: the step is finished, a checkpoint is written, and the run goes on from there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.checkpoint import read_metadata
from app.checkpoint_folder import list_checkpoints
from tests.end_to_end import runs


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stop_and_continue(number: signal.Signals, code: int, world: Path, grown_run: Path, tmp_path: Path) -> None:
    config = runs.settings(tmp_path / "run", world, max_steps=4000)
    config["growth"]["stages"] = None
    path = runs.write(config, tmp_path / "config.yaml")
    command = [sys.executable, "-m", "app", "fit", "--config", str(path)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ.copy())
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.csv").exists() or max(runs.losses(tmp_path / "run"), default=0) < 3:
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.1)
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == code, errors
    assert "Traceback" not in errors
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    last = max(runs.losses(tmp_path / "run"))
    assert read_metadata(newest)["step"] == last >= 3
    config["trainer"]["max_steps"] = last + 2
    config["model"]["init_args"]["schedule"]["decay_fraction"] = 0.0
    runs.fit(config, "--ckpt_path", "auto")
    assert set(runs.losses(tmp_path / "run")) == set(range(1, last + 3))

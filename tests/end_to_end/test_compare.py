"""`growmoe compare` from the command line: killed in the middle of a run, it goes on where it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from app.cli import main
from tests.end_to_end.runs import settings


def design(folder: Path, world: Path) -> dict[str, object]:
    """Two arms of a size, one of which grows; runs of a few seconds."""
    grown = {
        "model": {"init_args": {"architecture": {"dim": 16}}},
        "growth": {"stages": [{"at_fraction": 0.3, "target": {"dim": 24, "num_heads": 3}, "split_noise": 0.1}]},
    }
    return {
        "folder": str(folder),
        "seeds": [3],
        "budget": {"tokens_per_parameter": 4.0},
        "measure": {"rounds": 1, "warmup": 1, "steps": 3, "parts": 1},
        "common": {
            "trainer": {"accelerator": "cpu", "val_check_interval": 40, "log_every_n_steps": 1},
            "model": {
                "class_path": "modules.DenseLM",
                "init_args": {"optimizer": {"lr": 0.01}, "schedule": {"warmup_steps": 2}},
            },
            "data": settings(folder, world)["data"],
            "evaluation": {"suite": "synthetic", "limit": 2, "at_transitions": False},
            "checkpoint": {"every_n_steps": 10},
        },
        "sizes": {"small": {"model": {"init_args": {"architecture": {"dim": 24, "num_layers": 2, "num_heads": 3}}}}},
        "arms": {"dense": {}, "grown": {"sizes": {"small": grown | {"trainer": {"log_every_n_steps": 1}}}}},
    }


def test_a_killed_study_goes_on_where_it_was(tmp_path: Path, world: Path) -> None:
    config = design(tmp_path / "study", world)
    arms = config["arms"]
    assert isinstance(arms, dict)
    arms["grown"]["sizes"]["small"]["model"]["init_args"]["architecture"] |= {"num_heads": 2}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(config))
    started = subprocess.Popen([sys.executable, "-m", "app", "compare", "-c", str(path)], start_new_session=True)
    runs = tmp_path / "study" / "runs"
    deadline = time.monotonic() + 300
    while not list((runs / "small-grown").glob("*/checkpoints/step-00000010/manifest.json")):
        assert time.monotonic() < deadline and started.poll() is None, "the second run did not begin"
        time.sleep(0.02)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    (finished,) = runs.glob("small-dense/*/result.json")
    (unfinished,) = (path for path in runs.glob("small-grown/*") if path.is_dir())
    assert not (unfinished / "result.json").exists()
    measured = sorted((tmp_path / "study" / "measure").glob("*.json"))
    assert [file.name for file in measured] == ["small-dense-0.json", "small-grown-0.json"]
    before = [(file, file.stat().st_mtime_ns) for file in (finished, *measured)]
    time.sleep(1.0)
    log = unfinished.with_suffix(".log")
    size = log.stat().st_size
    time.sleep(0.5)
    assert log.stat().st_size == size, "the run ended with what had started it"

    main(["compare", "-c", str(path), "--seeds", "[3]"])
    assert [(file, file.stat().st_mtime_ns) for file in (finished, *measured)] == before
    again = log.read_bytes()[size:].decode()
    assert " · step 10 of " in again or " · step 20 of " in again, again
    record = json.loads((tmp_path / "study" / "study.json").read_text())
    assert (record["runs_planned"], record["runs_finished"]) == (2, 2)
    dense, grown = record["points"]["step_time"]
    assert grown["accelerator_seconds"] <= dense["accelerator_seconds"] * 1.001
    assert grown["accuracy"]["count"] == dense["accuracy"]["count"] == 1
    assert {path.name for path in (tmp_path / "study").iterdir()} >= {"study.md", "study.png", "report.html"}
    assert [path.name for path in (finished.parent / "checkpoints").iterdir() if path.is_dir()] == [
        f"step-{json.loads(finished.read_text())['steps']:08d}"
    ], "one checkpoint of a finished run stays"

"""Resuming under changed circumstances: nothing is lost, nothing is ignored in silence."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from app.checkpoint import load_state
from app.checkpoint_folder import list_checkpoints
from tests.end_to_end import runs
from tests.end_to_end.test_bad_input import refused


def plain(run_dir: Path, world: Path, **trainer: Any) -> dict[str, Any]:
    """A run without growth that saves every second step."""
    config = runs.settings(run_dir, world, val_check_interval=1000, **trainer)
    config["growth"]["stages"] = None
    config["checkpoint"] = {"every_n_steps": 2, "keep_last": 3}
    return config


def names(run_dir: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run_dir / "checkpoints")]


def state_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def parent(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.fit(plain(tmp_path_factory.mktemp("resume") / "parent", world, max_steps=8))


def test_old_checkpoints_are_pruned(parent: Path) -> None:
    assert names(parent) == ["step-00000004", "step-00000006", "step-00000008"]


def test_another_run_never_prunes_its_parent(parent: Path, world: Path, tmp_path: Path) -> None:
    before = state_of(parent)
    child = plain(tmp_path / "child", world, max_steps=16)
    runs.fit(child, "--ckpt_path", str(parent / "checkpoints" / "step-00000008"))
    assert state_of(parent) == before
    assert names(tmp_path / "child") == ["step-00000012", "step-00000014", "step-00000016"]


def test_changed_optimizer_settings_hold_on_resume(parent: Path, world: Path, tmp_path: Path) -> None:
    config = plain(tmp_path / "run", world, max_steps=10)
    config["model"]["init_args"]["optimizer"] = {"lr": 1e-4, "weight_decay": 0.0}
    config["model"]["init_args"]["schedule"] = {"kind": "constant", "warmup_steps": 0}
    runs.fit(config, "--ckpt_path", str(parent / "checkpoints" / "step-00000008"))
    assert float(runs.metrics(tmp_path / "run")[10]["train/lr"]) == 1e-4
    (optimizer,) = load_state(tmp_path / "run" / "checkpoints" / "step-00000010")["optimizer_states"]
    assert {(group["lr"], group["weight_decay"]) for group in optimizer["param_groups"]} == {(1e-4, 0.0)}


def test_accumulation_may_change_where_a_step_ends(
    parent: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = str(parent / "checkpoints" / "step-00000008")
    runs.fit(plain(tmp_path / "two", world, max_steps=12, accumulate_grad_batches=2), "--ckpt_path", last)
    assert set(runs.losses(tmp_path / "two")) == {9, 10, 11, 12}
    after = str(tmp_path / "two" / "checkpoints" / "step-00000012")
    runs.fit(plain(tmp_path / "one", world, max_steps=14), "--ckpt_path", after)
    assert set(runs.losses(tmp_path / "one")) == {13, 14}
    assert float(runs.metrics(tmp_path / "one")[14]["data/tokens"]) == (8 + 4 * 2 + 2) * 4 * 32
    config = plain(tmp_path / "three", world, accumulate_grad_batches=3)
    path = runs.write(config, tmp_path / "three.yaml")
    assert "accumulate_grad_batches=3 does not divide" in refused(
        capsys, "fit", "--config", str(path), "--ckpt_path", last
    )


def test_going_back_sets_later_checkpoints_aside(parent: Path, world: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(parent, copy)
    folder = copy / "checkpoints"
    shutil.copytree(folder / "step-00000006", folder / "step-00000010.tmp-0123abcd")  # of a save that was killed
    mine = folder / "step-00000010.tmp"
    mine.mkdir()
    runs.fit(plain(copy, world, max_steps=6), "--ckpt_path", str(folder / "step-00000004"))
    assert names(copy) == ["step-00000004", "step-00000006"]
    assert [path for path in folder.iterdir() if ".tmp" in path.name] == [mine]
    aside = sorted(path.name for path in (copy / "checkpoints").iterdir() if "superseded" in path.name)
    assert aside == ["step-00000006.superseded", "step-00000008.superseded"]


@pytest.mark.parametrize("what", ["data", "bit"])
def test_a_refused_resume_touches_nothing(
    what: str, parent: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(parent, copy)
    config = plain(copy, world, max_steps=12)
    state = copy / "checkpoints" / "step-00000006" / "state.pt"
    if what == "data":
        config["data"]["init_args"]["seed"] = 5
    else:
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    before = state_of(copy)
    path = runs.write(config, tmp_path / "config.yaml")
    line = refused(capsys, "fit", "--config", str(path), "--ckpt_path", str(state.parent))
    assert ("seed was 0, is 5" if what == "data" else "state.pt does not match its sha256") in line
    assert state_of(copy) == before

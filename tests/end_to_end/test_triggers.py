"""When a transition happens: a share of the run, a plateau of the validation loss; presets of published methods."""

from pathlib import Path
from typing import Any

import pytest

from app.checkpoint import read_metadata
from modules.errors import InputError
from modules.growth.stage import PRESETS, GrowthStage, GrowthTarget, Plateau
from tests.end_to_end import runs
from tests.end_to_end.test_bad_input import refused


def settings(run_dir: Path, world: Path, *stages: dict[str, Any], **trainer: Any) -> dict[str, Any]:
    config = runs.settings(run_dir, world, **trainer)
    config["growth"] = {"stages": list(stages)}
    config["checkpoint"] = {"every_n_steps": 2, "keep_last": 99}
    return config


def test_a_share_of_the_run(world: Path, tmp_path: Path) -> None:
    stages = ({"at_fraction": 0.3, "target": {"num_layers": 3}}, {"at_step": 9, "target": {"num_layers": 4}})
    run_dir = runs.fit(settings(tmp_path / "run", world, *stages))
    assert [record["step"] for record in runs.transitions(run_dir)] == [5, 9]  # 0.3 of 16 is 4.8


def test_a_plateau_also_across_a_resume(world: Path, tmp_path: Path) -> None:
    """Progress of 9 nats is never made: the third validation, at step 6, is the second one without."""
    plateau = {"patience": 2, "min_delta": 9.0}
    stages = ({"at_plateau": plateau, "target": {"num_layers": 3}}, {"at_step": 12, "target": {"num_layers": 4}})
    config = settings(tmp_path / "run", world, *stages, val_check_interval=2)
    run_dir = runs.fit(config)
    assert [record["step"] for record in runs.transitions(run_dir)] == [6, 12]
    want = runs.losses(run_dir)
    for step in (4, 8):  # one validation without progress; behind the transition
        config["trainer"]["default_root_dir"] = str(tmp_path / f"again-{step}")
        again = runs.fit(config, "--ckpt_path", str(run_dir / "checkpoints" / f"step-{step:08d}"))
        assert runs.losses(again) == {number: loss for number, loss in want.items() if number > step}
    assert read_metadata(run_dir / "checkpoints" / "step-00000016")["stage"] == 2


def test_a_falling_loss_is_no_plateau(world: Path, tmp_path: Path) -> None:
    stage = {"at_plateau": {"patience": 1, "min_delta": 0.0}, "target": {"num_layers": 3}}
    run_dir = runs.fit(settings(tmp_path / "run", world, stage, val_check_interval=4))
    losses = [float(row["val/loss"]) for row in runs.metrics(run_dir).values() if row.get("val/loss")]
    assert losses == sorted(losses, reverse=True) and not (run_dir / "transitions.jsonl").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"at_step": 3, "at_plateau": {}}, "at_step and at_plateau has more than one trigger"),
        ({"at_fraction": 1.5}, "at_fraction=1.5 must lie below 1"),
        ({"at_fraction": 0.0}, "at_fraction=0.0 must be a finite number above 0"),
        ({"at_plateau": {"patience": 0}}, "at_plateau.patience=0"),
        ({"at_step": 3, "preset": "net2net"}, "preset='net2net' is not known; choose one of fpi, aki"),
    ],
)
def test_triggers_that_make_no_sense(
    fields: dict[str, Any], words: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path / "run", world, {"target": {"num_layers": 3}, **fields})
    assert words in refused(capsys, "fit", "--config", str(runs.write(config, tmp_path / "c.yaml")))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_what_they_say_and_options_beside_them_win(preset: str) -> None:
    stage = GrowthStage(GrowthTarget(num_layers=9), at_step=1, preset=preset)
    assert all(getattr(stage, name) == value for name, value in PRESETS[preset].items())
    for options in ({"upcycle": "noise", "width": "lemon"}, {"upcycle": "drop", "width": "iso", "depth": "zero_block"}):
        other = GrowthStage(GrowthTarget(num_layers=9), at_plateau=Plateau(), preset=preset, **options)
        assert all(getattr(other, name) == value for name, value in options.items())
    with pytest.raises(InputError):
        GrowthStage(GrowthTarget(num_layers=9), preset=preset + "s")

"""Runs that start with the model of another checkpoint."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from app.checkpoint import (
    STATE,
    WEIGHTS,
    load_state,
    open_weights,
    read_metadata,
    read_tokenizer_json,
    write_checkpoint,
)
from app.cli import main
from datamodules.tokenizer import train_tokenizer
from tests.end_to_end import runs
from tests.end_to_end.test_bad_input import refused

ORIGIN = {"family": "mixtral", "files": {}, "begin_ids": [0], "end_ids": [1]}


@pytest.fixture(scope="module")
def seed_model(grown_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The final mixture of a run without the run: weights and tokenizer, as an imported model has them."""
    source, path = grown_run / "checkpoints" / "step-00000016", tmp_path_factory.mktemp("imported") / "seed"
    found = read_metadata(source)
    metadata = {"step": 0, "tokens": 0, "stage": 0, "architecture": found["architecture"], "factors": {}}
    metadata |= {"applied_transitions": [], "transition_records": [], "origin": ORIGIN}
    weights = open_weights(source)
    write_checkpoint(path, weights=weights, metadata=metadata, tokenizer_json=read_tokenizer_json(source))
    return path


def started(run_dir: Path, world: Path, seed_model: Path, model: str = "MoELM", **trainer: Any) -> dict[str, Any]:
    config = runs.settings(run_dir, world, **{"max_steps": 4, **trainer})
    config["model"]["class_path"] = f"modules.{model}"
    del config["model"]["init_args"]["architecture"]
    config["model"]["init_args"] |= {"start_from": str(seed_model), "schedule": {"warmup_steps": 1}}
    config["growth"] = {"stages": []}
    config["checkpoint"] = {"every_n_steps": 2, "keep_last": 9}
    return config


def test_a_run_starts_where_the_model_was(
    grown_run: Path, seed_model: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = started(tmp_path / "run", world, seed_model)
    capsys.readouterr()
    main(["validate", "--config", str(runs.write(config, tmp_path / "v.yaml"))])
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("val/"))
    recorded = runs.metrics(grown_run)[16]
    assert float(shown["val/loss"]) == pytest.approx(float(recorded["val/loss"]), abs=1e-4)
    run_dir = runs.fit(config)
    metadata = read_metadata(run_dir / "checkpoints" / "step-00000004")
    assert metadata["architecture"] == read_metadata(seed_model)["architecture"]
    assert metadata["origin"] == ORIGIN and metadata["stage"] == 0
    assert "began with [0]; documents of the data begin with" in capsys.readouterr().err
    assert float(runs.losses(run_dir)[1]) < float(runs.losses(grown_run)[1]) - 0.2  # not from fresh weights


def test_it_resumes_bit_for_bit_also_when_the_seed_is_gone(seed_model: Path, world: Path, tmp_path: Path) -> None:
    copy = tmp_path / "seed"
    shutil.copytree(seed_model, copy)
    config = started(tmp_path / "whole", world, copy)
    whole = runs.fit(config)
    shutil.rmtree(copy)
    config["trainer"]["default_root_dir"] = str(tmp_path / "again")
    again = runs.fit(config, "--ckpt_path", str(whole / "checkpoints" / "step-00000002"))
    left, right = (load_state(run / "checkpoints" / "step-00000004")["state_dict"] for run in (whole, again))
    assert all(torch.equal(left[name], weight) for name, weight in right.items())


def test_it_grows_inside_the_run_and_outside(seed_model: Path, world: Path, tmp_path: Path) -> None:
    stage = {"target": {"dim": 40, "num_heads": 5}, "split_noise": 0.1}
    config = started(tmp_path / "run", world, seed_model)
    config["growth"] = {"stages": [{**stage, "at_step": 2}]}
    (record,) = runs.transitions(runs.fit(config))
    assert record["exact"] and record["max_logit_drift"] < 1e-4
    recipe = runs.write(
        {"growth": {"stages": [stage]}}, tmp_path / "recipe.yaml"
    )  # outside there is no step to wait for
    output = tmp_path / "grown"
    main(["grow", str(seed_model), "--config", str(recipe), "--output", str(output), "--verify", "--dtype", "bfloat16"])
    metadata = read_metadata(output)
    assert metadata["architecture"]["dim"] == 40 and metadata["origin"]["family"] == "mixtral"
    assert metadata["transition_records"][0]["max_logit_drift"] < 0.05
    assert not (output / STATE).exists()
    assert open_weights(output).specs["embedding.weight"].dtype == torch.bfloat16
    runs.fit(started(tmp_path / "next", world, output))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": {"dim": 48}}, "has another architecture than the configuration: dim 24 / 48"),
        ({"start_from": "no/such/place"}, "no/such/place is not a checkpoint"),
    ],
)
def test_contradictions_are_refused(
    change: dict[str, Any],
    words: str,
    seed_model: Path,
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = started(tmp_path / "run", world, seed_model)
    config["model"]["init_args"] |= change
    assert words in refused(capsys, "fit", "--config", str(runs.write(config, tmp_path / "c.yaml")))
    assert not (tmp_path / "run").exists()


def test_what_an_imported_model_cannot_do_is_refused(
    seed_model: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = runs.write(started(tmp_path / "run", world, seed_model, "DenseLM"), tmp_path / "dense.yaml")
    assert "DenseLM got moe with num_experts=4" in refused(capsys, "fit", "--config", str(config))
    config = runs.write(runs.settings(tmp_path / "run", world), tmp_path / "plain.yaml")
    line = refused(capsys, "fit", "--config", str(config), "--ckpt_path", str(seed_model))
    assert "holds weights alone" in line and "--model.start_from" in line


def test_another_tokenizer_is_refused(
    seed_model: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, metadata = tmp_path / "other", read_metadata(seed_model)
    tokenizer = train_tokenizer(["some other words", "and others"], 512).to_json()
    write_checkpoint(other, weights=open_weights(seed_model), metadata=metadata, tokenizer_json=tokenizer)
    config = runs.write(started(tmp_path / "run", world, other), tmp_path / "c.yaml")
    assert "was prepared with another tokenizer" in refused(capsys, "fit", "--config", str(config))


def test_checkpoints_of_the_first_format_are_read(
    grown_run: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, old = grown_run / "checkpoints" / "step-00000016", tmp_path / "step-00000016"
    shutil.copytree(source, old)
    torch.save(load_state(source), old / STATE)
    (old / WEIGHTS).unlink()
    manifest = json.loads((old / "manifest.json").read_text())
    from app.checkpoint import fingerprint

    manifest["files"] = {name: fingerprint(old / name) for name in manifest["files"] if name != WEIGHTS}
    manifest["format_version"] = 1
    (old / "manifest.json").write_text(json.dumps(manifest))
    new = load_state(source)["state_dict"]
    assert all(torch.equal(new[name], weight) for name, weight in load_state(old)["state_dict"].items())
    weights = open_weights(old)
    assert all(torch.equal(weights.read(name), new[f"network.{name}"]) for name in weights.specs)
    config = runs.settings(tmp_path / "longer", world, max_steps=18)
    assert set(runs.losses(runs.fit(config, "--ckpt_path", str(old)))) == {17, 18}


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("taken", "exists, and nothing is ever overwritten"),
        ("dangling", "exists, and nothing is ever overwritten"),
        ("no/such/folder/x", "lies in a folder that does not exist"),
        ("file/x", "lies in a folder that does not exist"),
        ("n" * 250, "a name of 250 bytes"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_first(
    output: str, words: str, seed_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    recipe = str(runs.write({"growth": {"stages": [{"target": {"num_layers": 4}}]}}, tmp_path / "recipe.yaml"))
    before = sorted(tmp_path.iterdir())
    line = refused(capsys, "grow", str(seed_model), "--config", recipe, "--output", str(tmp_path / output))
    assert words in line and sorted(tmp_path.iterdir()) == before


def test_a_termination_clears_half_results_away(seed_model: Path, tmp_path: Path) -> None:
    """A process that is told to end in the middle of writing."""
    recipe = runs.write({"growth": {"stages": [{"target": {"num_layers": 4}}]}}, tmp_path / "recipe.yaml")
    program = (
        "import os, signal, sys, modules.weights as w; from app.cli import main; append = w._append\n"
        "def slow(*args): append(*args); os.kill(os.getpid(), signal.SIGTERM)\n"
        "w._append = slow; main(sys.argv[1:])"
    )
    words = ["grow", str(seed_model), "--config", str(recipe), "--output", str(tmp_path / "grown")]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_rounding_is_not_held_against_an_exact_growth(
    seed_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In bfloat16 rounding can turn a router's choice: it is told, and the model is written."""
    stage = {"target": {"dim": 40, "num_heads": 5}, "split_noise": 1.0}
    recipe = runs.write({"growth": {"stages": [stage]}}, tmp_path / "recipe.yaml")
    output = tmp_path / "grown"
    main(["grow", str(seed_model), "--config", str(recipe), "--output", str(output), "--dtype", "bfloat16"])
    assert read_metadata(output)["transition_records"][0]["max_logit_drift"] > 1e-3
    assert "largest change of a logit" in capsys.readouterr().out

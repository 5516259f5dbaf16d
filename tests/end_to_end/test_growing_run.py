"""The main job in small: a run that widens, deepens and upcycles, and resumes from anywhere."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from app.checkpoint import load_state, read_metadata
from app.checkpoint_folder import list_checkpoints
from app.cli import main
from modules.validation import validation_names
from tests.end_to_end import runs


def test_transitions_are_recorded_and_exact_ones_are_exact(grown_run: Path) -> None:
    first, second = runs.transitions(grown_run)
    assert (first["kind"], first["method"], first["step"]) == (["widen", "deepen"], ["iso", "zero_block"], 6)
    assert (second["kind"], second["method"], second["step"]) == ("upcycle", "drop", 12)
    assert first["exact"] and first["max_logit_drift"] < 1e-4
    assert not second["exact"] and second["max_logit_drift"] > 1e-3
    assert first["loss_before"] == pytest.approx(first["loss_after"], abs=1e-5)
    assert first["bpb_before"].keys() == {"en", "zh"} and first["bpb_after"] == pytest.approx(
        first["bpb_before"], abs=1e-5
    )
    nearby = runs.metrics(grown_run)[12]  # the step's validation, of other samples
    for language in ("en", "zh"):
        assert second["bpb_before"][language] == pytest.approx(float(nearby[f"val/bpb_{language}"]), rel=0.2)
        assert second["bpb_after"][language] != second["bpb_before"][language]
    assert second["params_total"] > second["params_active"] > first["params_active"]
    assert first["tokens"] == 6 * 4 * 32
    assert [first["source"]["dim"], first["target"]["dim"], second["target"]["moe"]["num_experts"]] == [16, 24, 4]


def test_the_run_directory_is_complete(grown_run: Path) -> None:
    rows = runs.metrics(grown_run)
    assert set(rows) == set(range(17))
    assert all(rows[step]["val/bpb_en"] and rows[step]["val/bpb_zh"] for step in (4, 8, 12, 16))
    assert [rows[step]["growth/stage"] for step in (6, 7, 12, 13)] == ["1", "1", "2", "2"]
    assert rows[16]["moe/load_cv"] and not rows[11]["moe/load_cv"]
    assert rows[16]["train/lr"] and rows[16]["perf/tokens_per_s"]
    load = [json.loads(line) for line in (grown_run / "expert_load.jsonl").read_text().splitlines()]
    assert set(load[0]["layers"]) == {"1"} and sum(load[0]["layers"]["1"]) == pytest.approx(1, abs=1e-3)
    assert "class_path: modules.DenseLM" in (grown_run / "config.yaml").read_text()


def test_any_checkpoint_repeats_the_run_bit_for_bit(grown_run: Path, world: Path, tmp_path: Path) -> None:
    """Before and after each transition, and in between: the resumed losses are the uninterrupted ones."""
    want = runs.losses(grown_run)
    checkpoints = list_checkpoints(grown_run / "checkpoints")
    boundaries = {f"step-{step:08d}-stage-{stage}" for step, stage in ((6, 0), (6, 1), (12, 1), (12, 2))}
    chosen = boundaries | {"step-00000000", "step-00000003", "step-00000015"}
    assert chosen | {"step-00000016"} <= {path.name for path in checkpoints}
    for path in (path for path in checkpoints if path.name in chosen):
        step = read_metadata(path)["step"]
        again = runs.fit(runs.settings(tmp_path / path.name, world), "--ckpt_path", str(path))
        got = runs.losses(again)
        assert got == {s: loss for s, loss in want.items() if s > step}, path.name
        final = load_state(again / "checkpoints" / "step-00000016")["state_dict"]
        for name, weight in load_state(grown_run / "checkpoints" / "step-00000016")["state_dict"].items():
            assert torch.equal(weight, final[name]), f"{name} from {path.name}"


def test_auto_continues_an_interrupted_run_in_its_directory(grown_run: Path, world: Path, tmp_path: Path) -> None:
    copy = tmp_path / "interrupted"
    shutil.copytree(grown_run, copy)
    for path in list_checkpoints(copy / "checkpoints"):
        if read_metadata(path)["step"] > 12:
            shutil.rmtree(path)
    newest = list_checkpoints(copy / "checkpoints")[-1]
    assert newest.name == "step-00000012-stage-2"
    damaged = newest / "state.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1  # one flipped bit: this one is passed over
    damaged.write_bytes(content)
    runs.fit(runs.settings(copy, world), "--ckpt_path", "auto")
    assert runs.losses(copy) == runs.losses(grown_run)
    assert [record["step"] for record in runs.transitions(copy)] == [6, 12]
    assert list(copy.glob("metrics.until-step-*"))


def test_grow_outside_the_run_is_the_transition_inside_it(grown_run: Path, tmp_path: Path) -> None:
    recipe = runs.write({"growth": {"stages": runs.RECIPE}}, tmp_path / "recipe.yaml")
    for step, stage in ((6, 0), (12, 1)):
        folder = grown_run / "checkpoints"
        output = tmp_path / f"grown-{step}"
        main(["grow", str(folder / f"step-{step:08d}-stage-{stage}"), "--config", str(recipe), "--output", str(output)])
        outside, inside = load_state(output), load_state(folder / f"step-{step:08d}-stage-{stage + 1}")
        assert outside["state_dict"].keys() == inside["state_dict"].keys()
        for name, weight in inside["state_dict"].items():
            assert torch.equal(weight, outside["state_dict"][name]), name
        (left,), (right,) = outside["optimizer_states"], inside["optimizer_states"]
        assert left["param_groups"] == right["param_groups"]
        assert left["state"].keys() == right["state"].keys()
        for number, tensors in right["state"].items():
            assert all(torch.equal(tensors[key], left["state"][number][key]) for key in tensors)
        assert outside["lr_schedulers"] == inside["lr_schedulers"]
        assert (
            read_metadata(output)["architecture"]
            == read_metadata(folder / f"step-{step:08d}-stage-{stage + 1}")["architecture"]
        )


def test_asymmetric_state_resumes_and_grows_outside_as_inside(world: Path, tmp_path: Path) -> None:
    """Entries of three ages in one parameter: resumed from between, and grown outside, bit for bit."""
    config = runs.settings(tmp_path / "run", world)
    stage = {"optimizer_state": "asymmetric", "warm_up_steps": 3, "split_noise": 0.1}
    stages = [
        {"at_step": 4, "target": {"dim": 24, "num_heads": 3, "num_layers": 3}, **stage},
        {"at_step": 8, "target": {"dim": 32, "num_heads": 4, "num_layers": 4}, **stage},
    ]
    config["growth"]["stages"] = stages
    config["checkpoint"] = {"every_n_steps": 2, "keep_last": 99}
    run_dir = runs.fit(config)
    want, folder = runs.losses(run_dir), run_dir / "checkpoints"
    births = [
        state["births"] for state in load_state(folder / "step-00000010")["optimizer_states"][0]["state"].values()
    ]
    assert max(len(ages) for ages in births) == 2
    for step in (6, 10):
        config["trainer"]["default_root_dir"] = str(tmp_path / f"again-{step}")
        again = runs.fit(config, "--ckpt_path", str(folder / f"step-{step:08d}"))
        assert runs.losses(again) == {number: loss for number, loss in want.items() if number > step}
    recipe = runs.write({"growth": {"stages": stages}}, tmp_path / "recipe.yaml")
    output = tmp_path / "grown"
    main(["grow", str(folder / "step-00000008-stage-1"), "--config", str(recipe), "--output", str(output)])
    outside, inside = load_state(output), load_state(folder / "step-00000008-stage-2")
    (left,), (right,) = outside["optimizer_states"], inside["optimizer_states"]
    assert left["param_groups"] == right["param_groups"]
    for number, state in right["state"].items():
        other = left["state"][number]
        assert state["births"] == other["births"] if "births" in state else "births" not in other
        assert all(torch.equal(state[key], other[key]) for key in ("exp_avg", "exp_avg_sq", "step"))


def test_muon_resumes_and_grows_outside_as_inside(grown_run: Path, world: Path, tmp_path: Path) -> None:
    """Widened, deepened and upcycled under Muon: resumed from between, and grown outside, bit for bit."""
    config = runs.settings(tmp_path / "run", world)
    config["model"]["init_args"]["optimizer"]["kind"] = "muon"
    config["checkpoint"] = {"every_n_steps": 4, "keep_last": 99}
    run_dir = runs.fit(config)
    want, folder = runs.losses(run_dir), run_dir / "checkpoints"
    assert float(want[16]) < float(want[1]) and runs.transitions(run_dir)[0]["max_logit_drift"] < 1e-4
    for name, step in (("step-00000006-stage-1", 6), ("step-00000008", 8), ("step-00000012-stage-2", 12)):
        config["trainer"]["default_root_dir"] = str(tmp_path / name)
        again = runs.fit(config, "--ckpt_path", str(folder / name))
        assert runs.losses(again) == {number: loss for number, loss in want.items() if number > step}
    recipe = runs.write({"growth": {"stages": runs.RECIPE}}, tmp_path / "recipe.yaml")
    for step, stage in ((6, 0), (12, 1)):
        output, start = tmp_path / f"grown-{step}", folder / f"step-{step:08d}-stage-{stage}"
        main(["grow", str(start), "--config", str(recipe), "--output", str(output)])
        outside, inside = load_state(output), load_state(folder / f"step-{step:08d}-stage-{stage + 1}")
        (left,), (right,) = outside["optimizer_states"], inside["optimizer_states"]
        assert left["param_groups"] == right["param_groups"] and left["state"].keys() == right["state"].keys()
        assert any("momentum_buffer" in state for state in right["state"].values())
        for number, tensors in right["state"].items():
            assert all(torch.equal(tensors[key], left["state"][number][key]) for key in tensors)


def test_another_optimizers_state_is_refused(
    grown_run: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = runs.settings(tmp_path / "run", world)
    config["model"]["init_args"]["optimizer"]["kind"] = "muon"
    with pytest.raises(SystemExit) as refused:
        runs.fit(config, "--ckpt_path", str(grown_run / "checkpoints" / "step-00000016"))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert refused.value.code == 2 and "model.optimizer.kind=muon" in error and "adamw" in error
    assert not (tmp_path / "run").exists()


def test_accumulation_and_reset_state_and_tokens_as_trigger(world: Path, tmp_path: Path) -> None:
    config = runs.settings(tmp_path / "run", world, accumulate_grad_batches=2, max_steps=8)
    config["growth"]["stages"] = [
        {"at_tokens": 3 * 2 * 4 * 32, "target": {"num_layers": 3}, "optimizer_state": "reset"},
        {"at_step": 6, "target": {"moe": {"num_experts": 4, "top_k": 2}}, "upcycle": "copy"},
    ]
    run_dir = runs.fit(config)
    first, second = runs.transitions(run_dir)
    assert (first["step"], first["optimizer_state"], second["step"]) == (3, "reset", 6)
    assert first["max_logit_drift"] == 0.0 and second["exact"] and second["max_logit_drift"] < 1e-4
    want = runs.losses(run_dir)
    config["trainer"]["default_root_dir"] = str(tmp_path / "again")
    again = runs.fit(config, "--ckpt_path", str(run_dir / "checkpoints" / "step-00000003-stage-1"))
    assert runs.losses(again) == {step: loss for step, loss in want.items() if step > 3}


def test_bfloat16_run_keeps_float32_masters(world: Path, tmp_path: Path) -> None:
    config = runs.settings(tmp_path / "run", world, precision="bf16-mixed")
    run_dir = runs.fit(config)
    assert all(record["max_logit_drift"] < 1e-4 for record in runs.transitions(run_dir) if record["exact"])
    weights = load_state(run_dir / "checkpoints" / "step-00000016")["state_dict"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert float(runs.losses(run_dir)[16]) < float(runs.losses(run_dir)[1])


def test_a_longer_run_resumes_from_the_last_checkpoint(grown_run: Path, world: Path, tmp_path: Path) -> None:
    config = runs.settings(tmp_path / "longer", world, max_steps=20)
    longer = runs.fit(config, "--ckpt_path", str(grown_run / "checkpoints" / "step-00000016"))
    assert set(runs.losses(longer)) == {17, 18, 19, 20}


def test_validate_measures_a_grown_checkpoint_as_the_run_did(
    grown_run: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs.write(runs.settings(tmp_path / "unused", world), tmp_path / "config.yaml")
    capsys.readouterr()
    main(["validate", "--config", str(path), "--ckpt_path", str(grown_run / "checkpoints" / "step-00000016")])
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("val/"))
    row = runs.metrics(grown_run)[16]
    assert {name: float(value) for name, value in shown.items()} == {
        name: pytest.approx(float(row[name]), abs=1e-4, rel=1e-6) for name in validation_names(["en", "zh"])
    }
    assert not (tmp_path / "unused").exists()


def test_a_plan_follows_the_checkpoint_it_is_given(
    grown_run: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With another recipe than that of its run it is refused, as a resume would be."""
    config, checkpoint = (
        runs.settings(tmp_path / "run", world),
        str(grown_run / "checkpoints" / "step-00000012-stage-2"),
    )
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--config", str(runs.write(config, tmp_path / "c.yaml")), "--ckpt_path", checkpoint])
    assert ended.value.code == 0 and "4 experts in 1" in capsys.readouterr().out
    config["growth"]["stages"][0]["split_noise"] = 0.3
    with pytest.raises(SystemExit) as refused:
        main(["plan", "--config", str(runs.write(config, tmp_path / "other.yaml")), "--ckpt_path", checkpoint])
    assert refused.value.code == 2 and "has gone through the transitions" in capsys.readouterr().err

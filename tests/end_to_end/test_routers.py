"""Every router of configs/router through the command line: it trains, validates, resumes bit for bit, and decodes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from app.checkpoint import load_state
from app.cli import main
from tests.end_to_end import runs
from tests.end_to_end.test_bad_input import refused

ROUTERS = sorted(Path(__file__).resolve().parents[2].glob("configs/router/*.yaml"))


def routed(run_dir: Path, world: Path, router: Path, **trainer: Any) -> list[str]:
    """Arguments of a run of a small mixture with a router laid over it."""
    config = runs.settings(run_dir, world, max_steps=8, accumulate_grad_batches=2, **trainer)
    config["growth"]["stages"] = None
    config["model"]["class_path"] = "modules.MoELM"
    shape = {"dim": 16, "num_layers": 2, "num_heads": 2, "moe": {"num_experts": 4, "top_k": 2}}
    config["model"]["init_args"]["architecture"] = shape
    config["checkpoint"] = {"every_n_steps": 3, "keep_last": 9}
    return ["--config", str(runs.write(config, run_dir.with_suffix(".yaml"))), "--config", str(router)]


@pytest.mark.parametrize("router", ROUTERS, ids=lambda path: path.stem)
def test_a_router_trains_and_resumes_bit_for_bit(
    router: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    main(["fit", *routed(whole, world, router)])
    assert float(runs.metrics(whole)[8]["moe/load_cv"]) >= 0
    checkpoints = whole / "checkpoints"
    main(["fit", *routed(again, world, router), "--ckpt_path", str(checkpoints / "step-00000003")])
    assert {step: loss for step, loss in runs.losses(whole).items() if step > 3} == runs.losses(again)
    ends = [load_state(run / "checkpoints" / "step-00000008")["state_dict"] for run in (whole, again)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]) and ends[0].keys() == ends[1].keys()
    biases = [bias for name, bias in ends[0].items() if name.endswith("selection_bias_E")]
    assert bool(biases) == (router.stem == "sigmoid_bias") and all(bias.abs().max() > 0 for bias in biases)
    capsys.readouterr()
    main(["validate", *routed(whole, world, router), "--ckpt_path", str(checkpoints / "step-00000008")])
    assert "val/bpb_en" in capsys.readouterr().out
    prompt = ["generate", str(checkpoints / "step-00000008"), "Question:", "--max_new_tokens", "4"]
    if router.stem == "expert_choice":
        assert "router.kind=expert_choice cannot decode" in refused(capsys, *prompt)
    else:
        main(prompt)


def test_tasks_need_a_router_that_does_not_look_ahead(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (router,) = (path for path in ROUTERS if path.stem == "expert_choice")
    arguments = routed(tmp_path / "run", world, router)
    line = refused(capsys, "fit", *arguments, "--evaluation.at_end", "true")
    assert "'synthetic' with router.kind=expert_choice" in line
    assert not (tmp_path / "run").exists()


def test_losses_may_change_on_resume_and_shapes_may_not(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (router,) = (path for path in ROUTERS if path.stem == "top_k")
    main(["fit", *routed(tmp_path / "run", world, router)])
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step-00000003")
    heavier = ["--ckpt_path", checkpoint, "--model.architecture.moe.balance_loss_weight", "1.0"]
    main(["fit", *routed(tmp_path / "heavier", world, router), *heavier])
    stored = yaml.safe_load((tmp_path / "heavier" / "config.yaml").read_text())
    assert stored["model"]["init_args"]["architecture"]["moe"]["balance_loss_weight"] == 1.0
    assert runs.metrics(tmp_path / "heavier")[8]["moe/load_cv"] != runs.metrics(tmp_path / "run")[8]["moe/load_cv"]
    wider = ["--ckpt_path", checkpoint, "--model.architecture.moe.top_k", "1"]
    assert "another architecture: moe" in refused(capsys, "fit", *routed(tmp_path / "wider", world, router), *wider)

"""The growing run of the end-to-end tests on several processes: the trace of one, resumed on any number."""

from pathlib import Path
from typing import Any

import pytest
import torch

from app.checkpoint import load_state
from app.cli import main
from tests.distributed.ranks import command, together
from tests.end_to_end import runs

ROWS = 4
STRATEGY = "app.strategies.ExpertParallelStrategy"


def settings(run_dir: Path, world: Path, world_size: int = 1, data_ranks: int = 1, **layout: Any) -> dict[str, Any]:
    """A run that grows from a dense model to a wider, deeper one and to a mixture, in float64."""
    config = runs.settings(run_dir, world, precision="64-true", max_steps=14, accumulate_grad_batches=2)
    config["data"]["init_args"]["batch_size"] = ROWS // data_ranks
    config["model"]["init_args"]["architecture"] = {"dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    config["growth"]["stages"] = [
        {"at_step": 4, "target": {"dim": 24, "num_heads": 6, "num_layers": 3}, "optimizer_state": "asymmetric"},
        {"at_step": 9, "target": {"moe": {"num_experts": 4, "top_k": 2, "every": 2}}, "upcycle": "drop"},
    ]
    config["checkpoint"] = {"every_n_steps": 3, "keep_last": 99}
    if layout:
        config["trainer"]["devices"] = world_size
        config["trainer"]["strategy"] = {"class_path": STRATEGY, "init_args": layout}
    return config


def fit(config: dict[str, Any], world_size: int, *arguments: str) -> Path:
    """Run `growmoe fit` on so many processes."""
    run_dir = Path(config["trainer"]["default_root_dir"])
    words = ["fit", "--config", str(runs.write(config, run_dir.with_suffix(".yaml"))), *arguments]
    if world_size == 1:
        main(words)
    else:
        together(world_size, run_dir.with_suffix(".ranks"), command, words)
    return run_dir


def figures(run_dir: Path) -> dict[int, list[float]]:
    """Training loss, gradient norm and, where there is one, validation loss of each step."""
    names = ("train/loss", "train/grad_norm", "val/loss", "val/bpb_en", "train/loss_zh", "data/tokens_en")
    return {
        step: [float(row[name]) for name in names if row.get(name)]
        for step, row in runs.metrics(run_dir).items()
        if row.get("train/loss")
    }


def assert_same(want: Path, got: Path) -> None:
    """All logged steps, and the last weights, to rounding in float64."""
    left, right = figures(want), figures(got)
    assert right and all(right[step] == pytest.approx(left[step], abs=1e-9) for step in right)
    ends = [load_state(run / "checkpoints" / "step-00000014") for run in (want, got)]
    for name, tensor in ends[0]["state_dict"].items():
        torch.testing.assert_close(ends[1]["state_dict"][name], tensor, rtol=0, atol=1e-9, msg=name)
    states = [end["optimizer_states"][0]["state"] for end in ends]
    for number, state in states[0].items():
        torch.testing.assert_close(states[1][number]["exp_avg"], state["exp_avg"], rtol=0, atol=1e-9)


EVALUATION = {"every_n_steps": 7, "at_transitions": True, "at_end": False, "limit": 20}


def answers(run_dir: Path) -> dict[str, str]:
    """What evaluations have written, by file."""
    return {path.name: path.read_text() for path in sorted(run_dir.glob("eval/*.json"))}


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    config = settings(tmp_path_factory.mktemp("alone") / "run", world)
    return fit(config | {"evaluation": EVALUATION}, 1)


@pytest.fixture(scope="module")
def two(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two, which share experts out once there are any."""
    config = settings(tmp_path_factory.mktemp("two") / "run", world, 2, 2, dp_shard=2, ep="auto")
    return fit(config | {"evaluation": EVALUATION}, 2)


def test_two_processes_grow_as_one(alone: Path, two: Path) -> None:
    assert_same(alone, two)
    drifts = [record["max_logit_drift"] for record in runs.transitions(two)]
    assert drifts[0] < 1e-10 < drifts[1]
    assert answers(two) == answers(alone) and len(answers(two)) >= 3


def test_evaluation_does_not_change_a_bit(two: Path, world: Path, tmp_path: Path) -> None:
    """On two processes that share experts out, through both transitions."""
    config = settings(tmp_path / "run", world, 2, 2, dp_shard=2, ep="auto")
    without = fit(config, 2)
    assert runs.losses(without) == runs.losses(two)
    ends = [load_state(run / "checkpoints" / "step-00000014") for run in (two, without)]
    for name, tensor in ends[0]["state_dict"].items():
        assert torch.equal(ends[1]["state_dict"][name], tensor), name


def test_four_processes_continue_what_two_began(alone: Path, two: Path, world: Path, tmp_path: Path) -> None:
    start = two / "checkpoints" / "step-00000003"  # before both transitions
    config = settings(tmp_path / "run", world, 4, 4, dp_replicate=2, dp_shard=2, ep=2)
    assert_same(alone, fit(config | {"evaluation": EVALUATION}, 4, "--ckpt_path", str(start)))
    assert answers(tmp_path / "run") == answers(alone)


def test_one_process_continues_what_two_began(alone: Path, two: Path, world: Path, tmp_path: Path) -> None:
    start = two / "checkpoints" / "step-00000006"  # while the new parts of the wider model are young
    assert_same(alone, fit(settings(tmp_path / "run", world), 1, "--ckpt_path", str(start)))


def test_two_processes_continue_what_one_began(alone: Path, world: Path, tmp_path: Path) -> None:
    start = alone / "checkpoints" / "step-00000009-stage-2"
    config = settings(tmp_path / "run", world, 2, 1, dp_shard=1, tp=2)
    assert_same(alone, fit(config | {"evaluation": EVALUATION}, 2, "--ckpt_path", str(start)))
    for name, found in answers(tmp_path / "run").items():  # heads and words parted, caches too
        assert found == answers(alone)[name], name

"""Two processes of half a batch train as one process of the whole: global balance, and the selection bias."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app.checkpoint import load_state
from app.cli import main
from tests.end_to_end.test_routers import ROUTERS, routed

ROOT = Path(__file__).resolve().parents[2]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_state(run_dir / "checkpoints" / "step-00000008")["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["global_balance", "sigmoid_bias"])
def test_ranks_count_together(name: str, tmp_path: Path) -> None:
    (router,) = (path for path in ROUTERS if path.stem == name)
    world, one, two = tmp_path / "world", tmp_path / "one", tmp_path / "two"
    exact = ["--trainer.precision", "64-true", "--model.architecture.moe.balance_loss_weight", "0.5"]
    exact += ["--evaluation.at_end", "false", "--trainer.accumulate_grad_batches", "1"]
    if name == "sigmoid_bias":
        exact += ["--model.architecture.moe.router.bias_update_rate", "0.05"]
        exact[3] = "0.0"
    main(["fit", *routed(one, world, router), *exact])
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "app",
        "fit",
    ]
    arguments = [*routed(two, world, router), *exact, "--data.batch_size", "2", "--trainer.strategy", "ddp"]
    arguments += ["--trainer.devices", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    left, right = weights(one), weights(two)
    for key, value in left.items():
        torch.testing.assert_close(value, right[key], rtol=0, atol=1e-10)
    biases = [value for key, value in left.items() if key.endswith("selection_bias_E")]
    assert bool(biases) == (name == "sigmoid_bias") and any(bias.abs().max() > 0 for bias in biases) == bool(biases)

"""growmoe on a Ray cluster: Ray starts the ranks and starts them again when a node is lost; each runs the command line.

    python configs/launch/ray_train.py --num_workers 16 --use_gpu fit --config configs/experiment/bilingual_micro.yaml

growmoe is installed on every node, and paths mean the same on each. See docs/launching.md.
"""

import argparse
import os
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(settings: dict[str, Any]) -> None:
    """Run growmoe on one rank: Ray has set the variables that torchrun sets, and the ranks have met."""
    from app.cli import main

    rank, local_rank, node = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))
    world_size, devices = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if world_size % devices or rank != node * devices + local_rank:
        raise ValueError(
            f"{world_size} workers are not spread evenly over nodes (rank {rank} is number {local_rank} of {devices} "
            f"on node {node}); choose a multiple of the GPUs of a node for --num_workers"
        )
    topology = ["--trainer.devices", str(devices), "--trainer.num_nodes", str(world_size // devices)]
    try:
        main([*settings["arguments"], *topology, "--ckpt_path", "auto"])
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"growmoe ended with {end.code} on rank {rank}") from None


def launch() -> None:
    """Read the number of workers, and hand everything else to them."""
    parser = argparse.ArgumentParser(description="growmoe on a Ray cluster")
    parser.add_argument("--num_workers", type=int, default=1, help="ranks, a multiple of the GPUs of a node")
    parser.add_argument("--use_gpu", action="store_true", help="one GPU for each rank")
    parser.add_argument("--max_failures", type=int, default=20, help="how often lost ranks are started again")
    parser.add_argument("--storage_path", help="a folder that all nodes share, for what Ray itself writes")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="fit and its options")
    given = parser.parse_args()
    trainer = TorchTrainer(
        train,
        train_loop_config={"arguments": given.arguments},
        scaling_config=ScalingConfig(num_workers=given.num_workers, use_gpu=given.use_gpu),
        run_config=RunConfig(
            storage_path=given.storage_path, failure_config=FailureConfig(max_failures=given.max_failures)
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    launch()

"""How long training waits for a checkpoint of two processes: in the background, until it is complete, gathered by one.

    python -m benchmarks.saving [--rounds 7] [--dim 512] [--layers 12]

from the root of the repository; gloo on this machine, weights and two moments in float32, interleaved.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from app.checkpoint import write_checkpoint
from app.strategies.layout import Layout
from app.strategies.saving import PartSaver
from modules.config import ModelConfig
from modules.optim import build_optimizer
from modules.weights import Weights
from modules.world import World
from tests.distributed.ranks import together
from tests.distributed.test_checkpoints import publish_as, tensors_of
from tests.distributed.training import Case, module_in, world_in

WAYS = ("in the background", "until complete", "gathered")


def measure(folder: Path, given: argparse.Namespace) -> None:
    """In each process."""
    dist.init_process_group("gloo")
    world, config = world_in(Layout(1, 2)), ModelConfig(8192, dim=given.dim, num_layers=given.layers, num_heads=8)
    case = Case(config, dtype=torch.float32)
    network: Any = module_in(world, case).network
    optimizer = build_optimizer(network, case.optimizer, {}, world)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    saver = PartSaver(dist.get_rank(), timedelta(minutes=5))
    turns = [turn(folder, saver, world, network, optimizer) for _ in range(given.rounds + 1)][1:]
    saver.close()
    if dist.get_rank() == 0:
        numel = sum(parameter.numel() for parameter in network.parameters())
        lines = [f"{numel / 1e6:.1f}M parameters, {3 * 4 * numel / 1e6:.0f} MB a checkpoint; seconds, median (range)"]
        for way, seconds in zip(WAYS, zip(*turns, strict=True), strict=True):
            lines.append(f"{way}: {statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})")
        (folder / "report").write_text("\n".join(lines) + "\n")
    dist.destroy_process_group()


def turn(folder: Path, saver: PartSaver, world: World, network: Any, optimizer: Any) -> tuple[float, float, float]:
    """Seconds of each way, once."""
    parted, whole = folder / "step-00000001", folder / "step-00000002"
    dist.barrier()
    begin = time.perf_counter()
    saver.start(parted, tensors_of(network, optimizer), publish_as(parted))
    begun = time.perf_counter() - begin
    saver.finish()
    complete = time.perf_counter() - begin
    dist.barrier()
    begin = time.perf_counter()
    tensors = {name: world.whole(tensor) for name, tensor in tensors_of(network, optimizer).items()}
    if dist.get_rank() == 0:
        write_checkpoint(whole, weights=Weights.of(tensors), metadata={"architecture": {}})
    dist.barrier()
    gathered = time.perf_counter() - begin
    if dist.get_rank() == 0:
        shutil.rmtree(parted)
        shutil.rmtree(whole)
    return begun, complete, gathered


def main() -> None:
    """Measure and print."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rounds", type=int, default=7, help="of each way, behind one that does not count")
    flags.add_argument("--dim", type=int, default=512, help="width of the model")
    flags.add_argument("--layers", type=int, default=12, help="its depth")
    given = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        together(2, Path(name) / "ranks", measure, Path(name), given)
        sys.stdout.write((Path(name) / "report").read_text())


if __name__ == "__main__":
    main()

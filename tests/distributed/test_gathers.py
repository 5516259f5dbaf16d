"""Weights that are gathered in bfloat16: under autocast nothing changes, to the last bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from app.strategies.layout import Layout
from app.strategies.parallelize import Gathers, Wrapping
from modules.config import ModelConfig
from tests.distributed.ranks import together
from tests.distributed.test_layouts import MOE, SHAPE
from tests.distributed.training import LENGTH, VOCABULARY, Case, Trained, module_in, train, world_in

CONFIGS = {
    "dense": ModelConfig(**{"vocab_size": VOCABULARY, **SHAPE}, qk_norm=True, qkv_bias=True),
    "mixture": ModelConfig(**{"vocab_size": VOCABULARY, **SHAPE}, moe=replace(MOE, num_shared_experts=1)),
}
LAYOUTS = [Layout(1, 2), Layout(1, 2, ep=2), Layout(2, 1), Layout(1, 1, tp=2)]


def trained(config: ModelConfig, layout: Layout, gathers: Gathers) -> Trained:
    """A few steps under autocast, two micro-batches each, attention computed again."""
    wrapping = Wrapping("selective", gathers=gathers)
    case = Case(config, accumulate=2, steps=3, wrapping=wrapping, dtype=torch.float32, is_mixed=True)
    return train(world_in(layout, wrapping), case)


def compare(folder: Path) -> None:
    """In each process."""
    dist.init_process_group("gloo")
    for config in CONFIGS.values():
        for layout in LAYOUTS:
            plain, rounded = (trained(config, layout, gathers) for gathers in ("float32", "bfloat16"))
            assert rounded.losses == plain.losses and rounded.norms == plain.norms, layout
            assert all(torch.equal(rounded.weights[name], weight) for name, weight in plain.weights.items()), layout
    probe()
    if dist.get_rank() == 0:
        (folder / "done").touch()
    dist.destroy_process_group()


@torch.no_grad()
def probe() -> None:
    """Outside of autocast, blocks compute as inside of it, and gathered weights are bfloat16."""
    world = world_in(Layout(1, 2), Wrapping(gathers="bfloat16"))
    network: Any = module_in(world, Case(CONFIGS["mixture"], dtype=torch.float32)).network
    tokens = torch.arange(LENGTH)[None]
    plain = network(tokens)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(tokens)[0], plain)
    assert world.product_dtype(torch.float32) == torch.bfloat16
    block = network.blocks[-1]
    for module, dtype in ((block.attention, torch.bfloat16), (block, torch.float32)):
        module.unshard()
        parameter = next(iter(module.parameters()))
        assert parameter.dtype == dtype, (type(module), parameter.dtype)
        module.reshard()


def test_rounded_gathers_train_as_autocast_does(tmp_path: Path) -> None:
    together(2, tmp_path / "ranks", compare, tmp_path)
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_rounded_gathers_are_for_autocast(precision: str, tmp_path: Path, world: Path, capsys: Any) -> None:
    from tests.distributed.test_growing import settings
    from tests.end_to_end.runs import write
    from tests.end_to_end.test_bad_input import refused

    config = settings(tmp_path / "run", world, 1, 1, gathers="bfloat16")
    config["trainer"]["precision"] = precision
    line = refused(capsys, "fit", "--config", str(write(config, tmp_path / "run.yaml")))
    assert "gathers=bfloat16" in line and "bf16-mixed" in line

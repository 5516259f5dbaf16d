"""What each process holds: any layout takes over from any other bit for bit, and mistakes in the sums are found."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from app.strategies import dispatchers
from app.strategies.layout import Layout
from app.strategies.parallelize import Wrapping
from app.strategies.world import MeshWorld
from modules.config import ModelConfig
from modules.layers.experts import Experts
from modules.world import ONE_PROCESS
from tests.distributed.ranks import together
from tests.distributed.test_layouts import CASES, EXACT, MOE, SHAPE
from tests.distributed.training import VOCABULARY, Case, Trained, distance, gather, scatter, train, world_in

SEVEN = [
    Layout(1, 4),
    Layout(1, 4, ep=2),
    Layout(1, 4, ep=4),
    Layout(2, 2),
    Layout(2, 2, ep=2),
    Layout(1, 2, tp=2),
    Layout(1, 2, ep=2, tp=2),
]
UNEVEN = Case(ModelConfig(**{**SHAPE, "vocab_size": VOCABULARY + 1, "dim": 24}, moe=MOE, qkv_bias=True), steps=2)
"""Words and biases that four processes cannot share evenly."""


def are_equal(one: Trained, other: Trained) -> bool:
    """Bit for bit."""
    states = [
        torch.equal(value, other.state[name][key]) for name, state in one.state.items() for key, value in state.items()
    ]
    weights = [torch.equal(value, other.weights[name]) for name, value in one.weights.items()]
    return all(states) and all(weights) and one.weights.keys() == other.weights.keys()


def hand_over(folder: Path) -> None:
    """Train in each layout, and take the result over in each other; count the pairs that are equal."""
    dist.init_process_group("gloo")
    pairs = 0
    for layout in SEVEN:
        before = train(world_in(layout), UNEVEN)
        for other in SEVEN:
            world = world_in(other)
            after = gather(world, *scatter(world, UNEVEN, before), [], [])
            pairs += are_equal(before, after)
    if dist.get_rank() == 0:
        (folder / "pairs").write_text(str(pairs))
    dist.destroy_process_group()


def test_forty_nine_pairs_of_layouts_hand_over_bit_for_bit(tmp_path: Path) -> None:
    together(4, tmp_path, hand_over, tmp_path)
    assert int((tmp_path / "pairs").read_text()) == 49


# -- mistakes that the comparison with one process must find -----------------------------------------------------------

RAGGED = replace(CASES["shared, fine, softmax first"], rows=5, steps=3)


def averaged_experts(world: MeshWorld, case: Case) -> Trained:
    """Gradients of experts divided by the processes that share them, as FSDP does by itself."""
    place = MeshWorld.place

    def wrong(self: MeshWorld, network: torch.nn.Module, device: torch.device) -> None:
        place(self, network, device)  # type: ignore[arg-type]
        for module in network.modules():
            if isinstance(module, Experts) and isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(2.0)

    with patch.object(MeshWorld, "place", wrong):
        return train(world, case)


def even_shares(world: MeshWorld, case: Case) -> Trained:
    """Each process divides by its own tokens."""
    with patch.object(MeshWorld, "share", lambda self, amount, like: 1.0 / self.data_ranks):
        return train(world, case)


def local_norm(world: MeshWorld, case: Case) -> Trained:
    """Each process clips by the norm of what it holds."""

    def wrong(self: MeshWorld, gradients: list[Tensor]) -> Tensor:
        return ONE_PROCESS.gradient_norm([self.local(gradient) for gradient in gradients])

    with patch.object(MeshWorld, "gradient_norm", wrong):
        return train(world, case)


MISTAKES: list[Callable[[MeshWorld, Case], Trained]] = [averaged_experts, even_shares, local_norm]


def static(world: MeshWorld, case: Case) -> Trained:
    """Sizes of the exchange known beforehand, as on accelerators."""
    made = dispatchers.AllToAllDispatcher.__init__

    def on_accelerator(self: dispatchers.AllToAllDispatcher, group: dist.ProcessGroup, num_experts: int) -> None:
        made(self, group, num_experts, static_shapes=True)

    with patch.object(dispatchers.AllToAllDispatcher, "__init__", on_accelerator):
        return train(world, case)


COMPILED = [replace(CASES[name], wrapping=Wrapping(compile=True), steps=3) for name in ("dense", "top-k")]


def compiled(folder: Path) -> None:
    """In each process: compiled blocks."""
    dist.init_process_group("gloo")
    found = [train(world_in(Layout(1, 2, ep=2), case.wrapping), case) for case in COMPILED]
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_compiled_blocks_train_alike(tmp_path: Path) -> None:
    together(2, tmp_path, compiled, tmp_path)
    for case, got in zip(COMPILED, torch.load(tmp_path / "found.pt", weights_only=False), strict=True):
        assert distance(train(ONE_PROCESS, case), got) < EXACT


STATIC = [replace(CASES[name], rows=8) for name in ("capacity", "gshard", "expert choice")]


def work(folder: Path) -> None:
    """In each process: the right way, the wrong ones, and exchanges of known size."""
    dist.init_process_group("gloo")
    world = world_in(Layout(1, 2, ep=2))
    found = [train(world, RAGGED), *(mistake(world, RAGGED) for mistake in MISTAKES)]
    found += [static(world, case) for case in STATIC]
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Trained]:
    """Of the ways of `work`, in their order."""
    folder = tmp_path_factory.mktemp("two")
    together(2, folder, work, folder)
    return torch.load(folder / "found.pt", weights_only=False)


def test_mistakes_are_found(found: list[Trained]) -> None:
    want = train(ONE_PROCESS, RAGGED)
    assert distance(want, found[0]) < EXACT
    for mistake, got in zip(MISTAKES, found[1:], strict=False):
        assert distance(want, got) > 1e-5, mistake.__name__


def test_exchanges_of_known_size_are_the_same(found: list[Trained]) -> None:
    for case, got in zip(STATIC, found[1 + len(MISTAKES) :], strict=True):
        assert distance(train(ONE_PROCESS, case), got) < EXACT

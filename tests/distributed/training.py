"""A few optimizer steps of one model, by one process or by several in some layout, on the same samples."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from app.strategies.layout import Layout
from app.strategies.parallelize import Wrapping
from app.strategies.world import MeshWorld
from modules.config import ModelConfig
from modules.language_model import LanguageModel
from modules.optim import OptimizerConfig, build_optimizer, clip_gradients
from modules.world import ONE_PROCESS, World, fill

VOCABULARY, LENGTH, MAX_NORM = 64, 12, 0.3


@dataclass(frozen=True)
class Case:
    """What is trained: a model, and how samples come."""

    config: ModelConfig
    rows: int = 8
    accumulate: int = 1
    steps: int = 6
    optimizer: OptimizerConfig = OptimizerConfig(lr=0.01)
    wrapping: Wrapping = Wrapping()
    dtype: torch.dtype = torch.float64
    is_mixed: bool = False
    """products in bfloat16, by autocast"""


@dataclass
class Trained:
    """Whole tensors by name, and what was seen on the way."""

    weights: dict[str, Tensor]
    state: dict[str, dict[str, Any]]
    losses: list[float]
    norms: list[float]


def world_in(layout: Layout, wrapping: Wrapping = Wrapping()) -> MeshWorld:
    """The world of the processes at hand in a layout."""
    world = _met(layout)
    world.wrapping = wrapping
    return world


@cache
def _met(layout: Layout) -> MeshWorld:
    """Met once: every group of processes has threads of its own."""

    def layout_of(config: ModelConfig | None) -> Layout:
        if config is not None:
            layout.check(config)
        return layout

    world = MeshWorld(layout_of, dist.get_rank(), Wrapping())
    world.meet("cpu")
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    return world


def module_in(world: World, case: Case) -> LanguageModel:
    """A fresh model, the same in every world."""
    torch.manual_seed(7)
    module = LanguageModel(case.config, case.optimizer)
    strategy = SimpleNamespace(world=world, root_device=torch.device("cpu"))
    module._trainer = SimpleNamespace(strategy=strategy, max_steps=case.steps)  # type: ignore[assignment]
    torch.set_default_dtype(case.dtype)
    try:
        module.configure_model()
    finally:
        torch.set_default_dtype(torch.float32)
    return module


def _tokens(rows: int, random: torch.Generator) -> Tensor:
    """A quarter of the vocabulary, so that there is something to learn; each word once in a row, since equal words in
    front of a row have equal values, and rounding would decide between them where experts choose."""
    return torch.stack([torch.randperm(VOCABULARY // 4, generator=random)[: LENGTH + 1] for _ in range(rows)])


def rows_of(world: World, rows: int) -> slice:
    """The rows of a batch that are this process's; where they do not come out even, the first ranks have more."""
    shares = [(rows + world.data_ranks - 1 - rank) // world.data_ranks for rank in range(world.data_ranks)]
    begin = sum(shares[: world.data_rank])
    return slice(begin, begin + shares[world.data_rank])


def train(world: World, case: Case, at_end: Callable[[Any, Any], None] = lambda network, optimizer: None) -> Trained:
    """Train; the result is the same on every process. Before it is gathered, `at_end` sees network and optimizer."""
    module = module_in(world, case)
    network: Any = module.network
    optimizer = build_optimizer(network, case.optimizer, {}, world)
    random = torch.Generator().manual_seed(3)
    losses, norms = [], []
    for _ in range(case.steps):
        loss = torch.zeros(())
        for part in range(case.accumulate):
            tokens = _tokens(case.rows, random)
            if world is not ONE_PROCESS:
                network.set_requires_gradient_sync(part == case.accumulate - 1)
            with torch.autocast("cpu", torch.bfloat16, enabled=case.is_mixed):
                output = module.training_step({"tokens": tokens[rows_of(world, case.rows)]}, part)
            (output["loss"] / case.accumulate).backward()
            loss = loss + output["loss"].detach() / case.accumulate
        losses.append(world.sum_over_data(loss).item())
        norms.append(clip_gradients(network.parameters(), MAX_NORM, world).item())
        optimizer.step()
        optimizer.zero_grad()
        module._balance.end_step(case.config.moe, network.routed_layers(), world)
    world.settle(network)
    at_end(network, optimizer)
    return gather(world, network, optimizer, losses, norms)


def gather(world: World, network: Any, optimizer: Any, losses: list[float], norms: list[float]) -> Trained:
    """All of a model and of its optimizer's state."""
    world.settle(network)
    weights = {name: world.whole(tensor).detach().clone() for name, tensor in network.state_dict().items()}
    state = {
        name: {key: world.whole(value).clone() for key, value in optimizer.state[parameter].items()}
        for name, parameter in network.named_parameters()
    }
    return Trained(weights, state, losses, norms)


def scatter(world: World, case: Case, trained: Trained) -> tuple[Any, Any]:
    """A model and an optimizer of this world with the values of another."""
    network: Any = module_in(world, replace(case)).network
    fill(world, network, trained.weights.items())
    optimizer = build_optimizer(network, case.optimizer, {}, world)
    for name, parameter in network.named_parameters():
        optimizer.state[parameter] = {
            key: value if key == "step" else world.part(value, parameter) for key, value in trained.state[name].items()
        }
    return network, optimizer


def distance(one: Trained, other: Trained) -> float:
    """The largest difference of a weight."""
    assert one.weights.keys() == other.weights.keys()
    return max((one.weights[name] - other.weights[name]).abs().max().item() for name in one.weights)

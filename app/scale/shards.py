"""What each rank holds: the real code's shapes, from a network without memory on a process group without processes.

All blocks of one kind are equal, so that one of each is built, however deep the model is.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, _redistribute, debug
from torch.testing._internal.distributed.fake_pg import FakeStore

from app.scale.tally import Tally, count_collectives
from app.strategies.layout import Layout
from app.strategies.mesh import copies
from app.strategies.parallelize import Wrapping
from app.strategies.world import MeshWorld
from modules.config import ModelConfig
from modules.layers.attention import Attention
from modules.layers.experts import Experts
from modules.layers.feedforward import FeedForward
from modules.layers.transformer import Block, Transformer
from modules.muon import is_hidden_matrix


@dataclass(frozen=True)
class Held:
    """A parameter, and what one rank has of it.

    Attributes:
        copies: ranks that hold the same part.
        is_muon: Muon trains it.
        gathered: what bringing all of it to this rank takes, which Muon does.
    """

    name: str
    whole: tuple[int, ...]
    local: tuple[int, ...]
    copies: int
    is_muon: bool
    gathered: Tally

    @property
    def numel(self) -> int:
        """Numbers of the whole."""
        return prod(self.whole)

    @property
    def local_numel(self) -> int:
        """Numbers on this rank."""
        return prod(self.local)


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers together.

    Attributes:
        place: "root", or the kind of block that they are in: "dense" or "routed".
        is_experts: experts, gathered apart from their block.
        is_rounded: gathered in bfloat16.
        count: how many such units the model has.
        sharers: ranks that share its parameters out.
    """

    place: str
    is_experts: bool
    is_rounded: bool
    count: int
    sharers: int
    parameters: tuple[Held, ...]

    @property
    def numel(self) -> int:
        """Numbers on this rank, of one unit."""
        return sum(held.local_numel for held in self.parameters)


@dataclass(frozen=True)
class Shards:
    """All that one rank holds."""

    rank: int
    units: tuple[Unit, ...]

    @property
    def numel(self) -> int:
        """Numbers on this rank."""
        return sum(unit.count * unit.numel for unit in self.units)

    @property
    def muon_numel(self) -> int:
        """Those that Muon trains."""
        return sum(unit.count * held.local_numel for unit, held in self.each() if held.is_muon)

    @property
    def whole_numel(self) -> int:
        """Numbers of the model."""
        return sum(unit.count * held.numel for unit, held in self.each())

    def each(self) -> Iterator[tuple[Unit, Held]]:
        """Every parameter, with its unit."""
        for unit in self.units:
            for held in unit.parameters:
                yield unit, held


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """This process is one of many that are not there: what it sends goes nowhere."""
    log = logging.getLogger(_redistribute.__name__)
    level = log.level
    log.setLevel(logging.ERROR)  # that a gather takes two steps is counted, not news
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        debug._clear_sharding_prop_cache()  # which would name groups of this world in the next one
        log.setLevel(level)


def shards_of(
    config: ModelConfig, layout: Layout, rank: int, is_muon: bool = False, wrapping: Wrapping = Wrapping()
) -> Shards:
    """What a rank of `layout` holds of a model; inside `fake_world`.

    Args:
        is_muon: bring each hidden matrix together, as Muon will, and count what that takes.
        wrapping: of which the type of gathers says what is gathered apart.
    """

    def layout_of(_: ModelConfig | None) -> Layout:
        return layout

    layout.check(config)
    world = MeshWorld(layout_of, rank, Wrapping(gathers=wrapping.gathers))
    world.meet("cpu")
    small = _one_block_of_each_kind(config)
    with torch.device("meta"):
        network = Transformer(small)
    world.place(network, torch.device("meta"))
    num_routed = len(config.routed_layers)
    counts = {"root": 1, "dense": config.num_layers - num_routed, "routed": num_routed}
    names = {parameter: name for name, parameter in network.named_parameters()}
    places = _places(network, small)
    units, seen = [], set()
    for module in reversed(list(network.modules())):  # inner modules first: theirs are not their parents'
        if isinstance(module, FSDPModule):
            own = [p for p in module.parameters() if p not in seen]
            seen.update(own)
            place, is_experts = places.get(module, "root"), isinstance(module, Experts)
            is_rounded = wrapping.gathers == "bfloat16" and isinstance(module, (Attention, FeedForward, Experts))
            held = tuple(_held(names[parameter], parameter, layout, is_muon) for parameter in own)
            sharers = layout.efsdp if is_experts else layout.dp_shard
            units.append(Unit(place, is_experts, is_rounded, counts[place], sharers, held))
    return Shards(rank, tuple(reversed(units)))


def _one_block_of_each_kind(config: ModelConfig) -> ModelConfig:
    num_routed = len(config.routed_layers)
    if config.moe is None or not num_routed:
        return replace(config, num_layers=1)
    has_dense = int(num_routed < config.num_layers)
    return replace(config, num_layers=1 + has_dense, moe=replace(config.moe, layers=(has_dense,)))


def _places(network: Transformer, config: ModelConfig) -> dict[torch.nn.Module, str]:
    """The kind of block that a module is in."""
    found: dict[torch.nn.Module, str] = {}
    for block in network.blocks:
        assert isinstance(block, Block)
        kind = "routed" if block.layer in config.routed_layers else "dense"
        found |= dict.fromkeys(block.modules(), kind)
    return found


def _held(name: str, parameter: torch.nn.Parameter, layout: Layout, is_muon: bool) -> Held:
    tensor = parameter.detach()
    assert isinstance(tensor, DTensor)
    is_muon = is_muon and is_hidden_matrix(name, parameter)
    gathered = Tally()
    if is_muon:
        with count_collectives() as gathered:
            tensor.full_tensor()
    local = tuple(tensor.to_local().shape)
    return Held(name, tuple(tensor.shape), local, copies(tensor, layout.world_size), is_muon, gathered)

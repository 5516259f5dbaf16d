"""What a plan says of each collective's bytes and calls is what real processes count in one step, to the byte."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from app.scale.shards import fake_world, shards_of
from app.scale.tally import KINDS, Tally, count_collectives
from app.scale.traffic import Collective, step_traffic
from app.scale.workload import Workload
from app.strategies.layout import Layout
from app.strategies.parallelize import Wrapping
from modules.config import ModelConfig
from modules.moe_config import CapacityConfig, MoEConfig, RouterConfig
from modules.optim import OptimizerConfig, build_optimizer, clip_gradients
from tests.distributed.ranks import together
from tests.distributed.training import LENGTH, VOCABULARY, Case, module_in, rows_of, world_in

TWO = [Layout(1, 2), Layout(1, 2, ep=2), Layout(1, 1, tp=2), Layout(2, 1)]
FOUR = [Layout(2, 2, ep=2), Layout(1, 4, ep=2), Layout(1, 2, ep=2, tp=2)]
Counted = dict[tuple[str, str], list[tuple[Tally, int]]]
"""By case and layout, of each rank."""
CHUNK_ROWS = 20
PER_RANK = 2
"""Sequences of a micro-batch on each rank."""

SHAPE = {"vocab_size": VOCABULARY, "dim": 16, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 32}
MOE = MoEConfig(num_experts=4, top_k=2, every=2)
GSHARD = replace(MOE, router=RouterConfig(kind="gshard"), capacity=CapacityConfig(2.0), layers=(0, 2))
SHARED = replace(MOE, num_experts=8, expert_dim=16, num_shared_experts=1, balance_level="sequence")
BIASED = replace(MOE, router=RouterConfig(score="sigmoid", bias_update_rate=0.1), balance_loss_weight=0.0)
AGAIN, KEPT = Wrapping("full"), Wrapping("selective", reshard_after_forward=False)
ROUNDED = Wrapping("selective", gathers="bfloat16")
CASES = {
    "dense": Case(ModelConfig(**SHAPE, qk_norm=True, tie_embeddings=True)),
    "dense, again": Case(ModelConfig(**SHAPE, norm_structure="hybridnorm"), accumulate=2, wrapping=AGAIN),
    "dense, odd words": Case(ModelConfig(**{**SHAPE, "vocab_size": VOCABULARY + 1}, o_bias=True), wrapping=KEPT),
    "dropless": Case(ModelConfig(**SHAPE, moe=MOE), accumulate=2),
    "capacity, again": Case(ModelConfig(**SHAPE, moe=GSHARD), wrapping=AGAIN),
    "shared": Case(ModelConfig(**SHAPE, moe=replace(SHARED, shared_gate=True)), wrapping=AGAIN),
    "shared, muon": Case(ModelConfig(**SHAPE, moe=SHARED), optimizer=OptimizerConfig("muon"), wrapping=AGAIN),
    "global": Case(ModelConfig(**SHAPE, qk_norm=True, moe=replace(MOE, balance_level="global")), wrapping=KEPT),
    "biased": Case(ModelConfig(**SHAPE, moe=BIASED), accumulate=2),
    "rounded": Case(ModelConfig(**SHAPE, qk_norm=True, moe=SHARED), accumulate=2, wrapping=ROUNDED),
}
FOR_FOUR = ("dense", "dropless", "capacity, again", "shared", "shared, muon", "rounded")
"""Cases that four processes go through, too."""
LOW_PRECISION = ("dense, again", "capacity, again", "shared, muon", "rounded")
"""Cases under autocast to bfloat16; the others are in float32."""


def one_step(name: str, layout: Layout) -> tuple[Tally, int]:
    """What this process sends in one step, and how many numbers it holds."""
    case = replace(CASES[name], rows=PER_RANK * layout.data_ranks, dtype=torch.float32)
    world = world_in(layout, case.wrapping)
    module = module_in(world, case)
    module.loss_chunk_rows = CHUNK_ROWS
    network: Any = module.network
    optimizer = build_optimizer(network, case.optimizer, {}, world)
    tokens = torch.randint(VOCABULARY, (case.rows, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    batch = {"tokens": tokens[rows_of(world, case.rows)]}
    precision = torch.autocast("cpu", torch.bfloat16) if name in LOW_PRECISION else nullcontext()
    with count_collectives() as tally:
        for part in range(case.accumulate):
            network.set_requires_gradient_sync(part == case.accumulate - 1)
            with precision:
                loss = module.training_step(batch, part)["loss"]
            loss.backward()
        clip_gradients(network.parameters(), 1.0, world)
        optimizer.step()
        module._balance.end_step(case.config.moe, network.routed_layers(), world)
    return tally, sum(world.local(parameter).numel() for parameter in network.parameters())


def work_all(folder: Path, layouts: list[Layout]) -> None:
    """In each process: every case in every layout."""
    dist.init_process_group("gloo")
    names = CASES if dist.get_world_size() == 2 else FOR_FOUR
    counted = {(name, str(layout)): one_step(name, layout) for layout in layouts for name in names}
    torch.save(counted, folder / f"counted-{dist.get_rank()}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Counted:
    """Tallies of all ranks by case and layout."""
    merged: Counted = {}
    for size, layouts in ((2, TWO), (4, FOUR)):
        folder = tmp_path_factory.mktemp(f"world-{size}")
        together(size, folder, work_all, folder, layouts)
        for rank in range(size):
            for key, found in torch.load(folder / f"counted-{rank}.pt", weights_only=False).items():
                merged.setdefault(key, []).append(found)
    return merged


def planned(name: str, layout: Layout) -> list[Collective]:
    """The plan's collectives of the same step."""
    case = CASES[name]
    work = Workload(
        case.config,
        layout,
        PER_RANK,
        LENGTH,
        case.wrapping,
        case.accumulate,
        CHUNK_ROWS,
        compute_bytes=2 if name in LOW_PRECISION else 4,
        is_muon=case.optimizer.kind == "muon",
        knows_sizes=False,
    )
    with fake_world(0, layout.world_size):
        return step_traffic(work, shards_of(case.config, layout, 0, work.is_muon, case.wrapping))


@pytest.mark.parametrize(
    ("name", "layout"), [*product(CASES, TWO), *product(FOR_FOUR, FOUR)], ids=lambda value: str(value)
)
def test_bytes_and_calls_are_those_of_a_real_step(name: str, layout: Layout, counted: Counted) -> None:
    want_bytes: Counter[str] = Counter()
    want_calls: Counter[str] = Counter()
    for collective in planned(name, layout):
        want_bytes[collective.kind] += collective.num_bytes
        want_calls[collective.kind] += collective.calls
    tallies = [tally for tally, _ in counted[name, str(layout)]]
    for kind in KINDS:
        got = [tally.num_bytes[kind] for tally in tallies]
        assert [tally.calls[kind] for tally in tallies] == [want_calls[kind]] * len(tallies), kind
        assert sum(got) == want_bytes[kind] * len(tallies), kind
        moe = CASES[name].config.moe
        if kind != "all_to_all" or moe is None or moe.capacity is not None:  # else it depends on where tokens go
            assert got == [want_bytes[kind]] * len(tallies), kind


@pytest.mark.parametrize("layout", FOUR, ids=str)
def test_parameters_are_those_of_each_real_rank(layout: Layout, counted: Counted) -> None:
    for name in ("dense", "dropless"):
        for rank, (_, numel) in enumerate(counted[name, str(layout)]):
            with fake_world(rank, layout.world_size):
                assert shards_of(CASES[name].config, layout, rank).numel == numel, (name, rank)


def test_every_kind_is_there(counted: Counted) -> None:
    for kind in KINDS:
        assert any(tally.num_bytes[kind] for ranks in counted.values() for tally, _ in ranks), kind

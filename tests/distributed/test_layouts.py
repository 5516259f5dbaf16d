"""Training in every layout is training by one process: parameters after six clipped AdamW steps, in float64."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from app.strategies.layout import Layout
from app.strategies.parallelize import Wrapping
from modules.config import ModelConfig
from modules.moe_config import CapacityConfig, MoEConfig, RouterConfig
from modules.optim import OptimizerConfig
from modules.world import ONE_PROCESS
from tests.distributed.ranks import together
from tests.distributed.training import MAX_NORM, VOCABULARY, Case, Trained, distance, train, world_in

TWO = [Layout(1, 2), Layout(1, 2, ep=2), Layout(2, 1), Layout(1, 1, tp=2)]
FOUR = [
    Layout(1, 2, ep=2, tp=2),
    Layout(2, 2, ep=2),
    Layout(1, 4, ep=2),
    Layout(1, 4, ep=4),
    Layout(1, 4),
    Layout(2, 2),
    Layout(1, 2, tp=2),
]
EXACT = 1e-10

SHAPE = {"vocab_size": VOCABULARY, "dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 32}
MOE = MoEConfig(num_experts=4, top_k=2, balance_loss_weight=0.1, z_loss_weight=0.01)
ROUTERS = {
    "top-k": MOE,
    "shared, fine, softmax first": replace(
        MOE, num_experts=8, top_k=3, expert_dim=16, num_shared_experts=1, shared_gate=True, renormalize=False
    ),
    "gshard": replace(MOE, router=RouterConfig(kind="gshard"), capacity=CapacityConfig(1.0), aux_reduction="sum"),
    "capacity": replace(MOE, capacity=CapacityConfig(1.25), balance_level="group"),
    "sequence": replace(MOE, balance_level="sequence", every=2),
    "global": replace(MOE, balance_level="global"),
    "bias": replace(MOE, router=RouterConfig(score="sigmoid", bias_update_rate=0.05), balance_loss_weight=0.0),
    "expert choice": replace(
        MOE,
        router=RouterConfig(kind="expert_choice"),
        capacity=CapacityConfig(2.0),
        renormalize=False,
        balance_loss_weight=0.0,
    ),
}
CASES = {
    "dense": Case(ModelConfig(**SHAPE, qkv_bias=True, tie_embeddings=True), accumulate=2),
    "dense, ragged": Case(ModelConfig(**SHAPE, qk_norm=True, norm_structure="hybridnorm"), rows=7),
    "odd sizes": Case(ModelConfig(**{**SHAPE, "vocab_size": VOCABULARY + 1, "dim": 20, "num_heads": 10}, o_bias=True)),
    "muon": Case(ModelConfig(**SHAPE, moe=MOE), optimizer=OptimizerConfig("muon", lr=0.01), rows=6),
    "selective": Case(ModelConfig(**SHAPE, moe=MOE), wrapping=Wrapping("selective"), accumulate=2),
    "few experts": Case(ModelConfig(**SHAPE, moe=replace(MOE, num_experts=2, top_k=1, renormalize=False))),
    "full": Case(ModelConfig(**SHAPE, moe=MOE), wrapping=Wrapping("full", reshard_after_forward=False)),
} | {
    name: Case(ModelConfig(**SHAPE, moe=moe), rows=7 if number % 2 else 8, accumulate=1 + number // 2 % 2)
    for number, (name, moe) in enumerate(ROUTERS.items())
}


EVERYWHERE = ("dense", "shared, fine, softmax first", "capacity")
"""Trained in every layout by the fast tests; the other cases in those of `SOME`, and in every one by the slow test."""
SOME = [Layout(1, 2, ep=2), Layout(1, 1, tp=2), Layout(1, 2, ep=2, tp=2)]

Found = dict[tuple[str, str], Trained]


def chosen(name: str, layout: Layout) -> bool:
    """Whether the fast tests train a case in a layout; the slow test trains the others."""
    return name in EVERYWHERE or layout in SOME or (name == "few experts" and layout.dp_shard == 4)


def fits(case: Case, layout: Layout) -> bool:
    """Whether there are enough experts."""
    return case.config.moe is None or case.config.moe.num_experts % layout.ep == 0


def work(folder: Path, layouts: list[Layout], fast: bool) -> None:
    """In each process: cases in layouts."""
    dist.init_process_group("gloo")
    found: Found = {}
    for layout in layouts:
        for name, case in CASES.items():
            if chosen(name, layout) == fast and fits(case, layout):
                found[name, str(layout)] = train(world_in(layout, case.wrapping), case)
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


def trained(factory: pytest.TempPathFactory, fast: bool) -> Found:
    """What came of cases in layouts of two and of four processes."""
    found: Found = {}
    for size, layouts in ((2, TWO), (4, FOUR)):
        folder = factory.mktemp(f"world-{size}")
        together(size, folder, work, folder, layouts, fast)
        found |= torch.load(folder / "found.pt", weights_only=False)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What the fast tests look at."""
    return trained(tmp_path_factory, True)


def check(name: str, found: Found) -> None:
    """Compare one case in every layout with one process."""
    want = train(ONE_PROCESS, CASES[name])
    assert want.losses[-1] < want.losses[0] and max(want.norms) > MAX_NORM  # it learns, and gradients are clipped
    layouts = {layout: got for (case, layout), got in found.items() if case == name}
    assert layouts
    for layout, got in layouts.items():
        assert distance(want, got) < EXACT, layout
        assert got.losses == pytest.approx(want.losses, abs=EXACT), layout
        assert got.norms == pytest.approx(want.norms, abs=EXACT), layout
        for parameter, state in want.state.items():
            for key, value in state.items():
                torch.testing.assert_close(got.state[parameter][key], value, rtol=0, atol=EXACT, msg=f"{layout} {key}")


@pytest.mark.parametrize("name", CASES)
def test_a_layout_trains_as_one_process(name: str, found: Found) -> None:
    check(name, found)


@pytest.mark.slow
def test_every_layout_trains_every_case_as_one_process(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = trained(tmp_path_factory, False)
    for name in set(CASES) - set(EVERYWHERE):
        check(name, found)

"""Muon against a reference by singular values and against torch's, and its state through growth."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modules.config import ModelConfig
from modules.growth.stage import GrowthTarget
from modules.growth.transition import build_transition, materialize, network_source
from modules.layers.transformer import Transformer
from modules.moe_config import MoEConfig
from modules.muon import MOMENTUM, MuonAdamW, is_hidden_matrix, orthogonalized
from modules.optim import OptimizerConfig, ParameterFactors, build_optimizer
from tests.reference import muon as reference
from tests.unit.growth_helpers import (
    EXACT,
    ROUTED,
    drift,
    make,
    optimizer_of,
    paths_part,
    stage,
    state_of,
    train_step,
)

SETTINGS = OptimizerConfig(kind="muon", lr=1e-2, weight_decay=0.1, eps=1e-3)


def muon_of(parameter: nn.Parameter, **changed: Any) -> MuonAdamW:
    group = {"params": [parameter], "is_muon": True, "momentum": 0.9, "weight_decay": 0.2, **changed}
    return MuonAdamW([group], lr=0.03, fused=True)


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), experts=st.integers(1, 3), seed=st.integers(0, 99))
def test_steps_are_those_of_the_reference_for_each_expert(rows: int, columns: int, experts: int, seed: int) -> None:
    torch.manual_seed(seed)
    weights = nn.Parameter(torch.randn(experts, rows, columns, dtype=torch.float64))
    singles = [reference.Muon(weight, 0.03, 0.2, 0.9) for weight in weights.detach()]
    optimizer = muon_of(weights)
    for _ in range(3):
        weights.grad = torch.randn_like(weights)
        optimizer.step()
        for single, gradient in zip(singles, weights.grad, strict=True):
            single.step(gradient)
    torch.testing.assert_close(weights.detach(), torch.stack([single.weight for single in singles]), rtol=0, atol=EXACT)


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_matches_torchs_muon_up_to_its_bfloat16(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    optimizer = muon_of(ours)
    other = torch.optim.Muon([theirs], lr=0.03, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        other.step()
    moved = (theirs.detach() - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_a_matrix_without_gradient_stays_and_zero_gradients_are_harmless() -> None:
    still, zero = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    groups = [{"params": [still, zero], "is_muon": True, "momentum": 0.9, "weight_decay": 0.0}]
    optimizer = MuonAdamW(groups, lr=0.1, fused=True)
    zero.grad = torch.zeros(2, 3)
    optimizer.step()
    assert (still == 1).all() and (zero == 1).all() and still not in optimizer.state


def test_singular_values_come_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalized(torch.randn(3, 20, 50, dtype=torch.float64)))
    assert values.min() > 0.6 and values.max() < 1.3


def test_muon_has_the_matrices_of_blocks_and_adamw_the_rest() -> None:
    moe = MoEConfig(4, 2, num_shared_experts=1, shared_gate=True)
    network = Transformer(ModelConfig(20, dim=16, num_layers=2, num_heads=2, qkv_bias=True, moe=moe))
    chosen = {name for name, parameter in network.named_parameters() if is_hidden_matrix(name, parameter)}
    parts = {name.split(".", 2)[2] for name in chosen}
    experts = {f"feed_forward.experts.{part}" for part in ("gate", "up", "down")}
    shared = {f"feed_forward.shared.{part}.weight" for part in ("gate", "up", "down")}
    assert parts == experts | shared | {f"attention.{part}_proj.weight" for part in "qkvo"}
    optimizer = build_optimizer(network, SETTINGS, {})
    train_step(network.double(), optimizer, torch.randint(20, (2, 9)))
    for name, state in state_of(network, optimizer).items():
        assert (MOMENTUM in state) == (name in chosen) and ("exp_avg" in state) == (name not in chosen)


def test_factors_reach_the_groups_of_their_own_rule() -> None:
    network = Transformer(ModelConfig(20, dim=16, num_layers=1, num_heads=2))
    query = "blocks.0.attention.q_proj.weight"
    factors = {name: ParameterFactors(2.0, 0.5, 3.0, 4.0) for name in ("head.weight", query)}
    rates = {}
    for kind in ("adamw", "muon"):
        optimizer = build_optimizer(network, replace(SETTINGS, kind=kind), factors)
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        for group in optimizer.param_groups:
            rates |= {(kind, names[id(p)]): (group["lr"], group["weight_decay"]) for p in group["params"]}
    plain, more = (0.02, 0.05), (0.08, 0.0125)
    assert rates["adamw", "head.weight"] == rates["muon", "head.weight"] == pytest.approx(plain)
    assert rates["adamw", query] == pytest.approx(plain)
    assert rates["muon", query] == pytest.approx(more)


# Growth


@pytest.mark.parametrize(
    ("kv", "norms", "routed"),
    [(1, "prenorm", "none"), (4, "prenorm", "none"), (4, "hybridnorm", "shared"), (1, "postnorm", "plain")],
)
@pytest.mark.parametrize(("width", "copies"), [("iso", "even"), ("iso", "powers"), ("fpi", "even")])
def test_mapped_state_follows_the_small_model_for_ten_steps(
    width: Any, copies: Any, kv: int, norms: Any, routed: str
) -> None:
    """Integer ratios in every width: the momentum, and the size of steps that goes by the shape."""
    torch.manual_seed(0)
    small = make(
        ModelConfig(
            vocab_size=20,
            dim=16,
            num_layers=2,
            num_heads=4,
            num_kv_heads=kv,
            ffn_dim=24,
            qkv_bias=True,
            norm_structure=norms,
            moe=ROUTED[routed],
        )
    )
    to = GrowthTarget(dim=64, num_heads=8, num_kv_heads=kv if kv == 1 else 8, ffn_dim=48 if copies == "powers" else 72)
    assert max(paths_part(small, stage(to, width=width, copies=copies), SETTINGS)) < 1e-8


def test_without_the_factor_of_the_shape_the_path_is_left() -> None:
    torch.manual_seed(0)
    small = make(ModelConfig(20, dim=16, num_layers=2, num_heads=4, ffn_dim=24))
    optimizer = build_optimizer(small, SETTINGS, {})
    train_step(small, optimizer, torch.randint(20, (2, 9)))
    to = stage(GrowthTarget(dim=64, ffn_dim=48))
    transition = build_transition(network_source(small, state_of(small, optimizer), {}), to)
    large, other = (materialize(transition.grown, "cpu") for _ in range(2))
    right, wrong = (optimizer_of(transition.grown, network, SETTINGS) for network in (large, other))
    for group in wrong.param_groups:
        group["lr"] = SETTINGS.lr if group["is_muon"] else group["lr"]
    tokens = torch.randint(20, (2, 9))
    for network, rule in ((small, optimizer), (large, right), (other, wrong)):
        train_step(network, rule, tokens)
    assert drift(small, large) < EXACT < 1e-3 < drift(small, other)


def test_asymmetric_state_keeps_old_momentum_and_warms_new_entries_up() -> None:
    torch.manual_seed(0)
    small = make(ModelConfig(20, dim=16, num_layers=1, num_heads=4))
    optimizer = build_optimizer(small, SETTINGS, {})
    for _ in range(3):
        train_step(small, optimizer, torch.randint(20, (2, 9)))
    before = state_of(small, optimizer)
    to = stage(GrowthTarget(ffn_dim=80), optimizer_state="asymmetric", warm_up_factor=3.0, warm_up_steps=2)
    grown = build_transition(network_source(small, before, {}), to).grown
    large = materialize(grown, "cpu")
    settings = replace(SETTINGS, weight_decay=0.0)
    rule = optimizer_of(grown, large, settings)
    gate = large.blocks[0].feed_forward.gate.weight
    name, rows = "blocks.0.feed_forward.gate.weight", small.blocks[0].feed_forward.gate.weight.shape[0]
    assert torch.equal(rule.state[gate][MOMENTUM][:rows], before[name][MOMENTUM])
    assert not rule.state[gate][MOMENTUM][rows:].any()
    for factor in (2.0, 3.0, 2.0, 1.0):
        start = gate.detach().clone()
        gate.grad = torch.randn_like(gate)
        ahead = rule.state[gate][MOMENTUM].lerp(gate.grad, 1 - settings.momentum)
        step = reference.orthogonalized(gate.grad.lerp(ahead, settings.momentum)) * 0.2 * max(gate.shape) ** 0.5
        rule.step()
        moved = (start - gate.detach()) / settings.lr
        torch.testing.assert_close(moved[:rows], step[:rows], rtol=0, atol=1e-8)
        torch.testing.assert_close(moved[rows:], factor * step[rows:], rtol=0, atol=1e-8)


def test_births_are_forgotten_once_they_make_no_difference() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    optimizer = muon_of(weight, momentum=0.5)
    weight.grad = torch.randn(3, 4)
    optimizer.step()
    optimizer.state[weight]["births"] = [{"old": [2, 4], "step": 1.0, "factor": 2.0, "steps": 4}]
    for _ in range(25):
        weight.grad = torch.randn(3, 4)
        optimizer.step()
    assert optimizer.state[weight]["births"] == []


def test_an_upcycled_model_trains_on_with_the_dense_momentum() -> None:
    """Every expert has its share of it, and the first steps of equal experts are equal."""
    torch.manual_seed(0)
    small = make(ModelConfig(20, dim=16, num_layers=1, num_heads=4, ffn_dim=24))
    optimizer = build_optimizer(small, SETTINGS, {})
    for _ in range(3):
        train_step(small, optimizer, torch.randint(20, (2, 9)))
    before = state_of(small, optimizer)
    to = stage(GrowthTarget(moe=MoEConfig(4, 2)), upcycle="copy")
    grown = build_transition(network_source(small, before, {}), to).grown
    moments = grown.moments("blocks.0.feed_forward.experts.down")
    assert moments is not None and moments.second is None
    dense = before["blocks.0.feed_forward.down.weight"][MOMENTUM].T
    torch.testing.assert_close(moments.first, (dense / 4).expand(4, -1, -1))
    large = materialize(grown, "cpu")
    rule = optimizer_of(grown, large, SETTINGS)
    start = drift(small, large)
    for _ in range(3):
        train_step(large, rule, torch.randint(20, (2, 9)))
    assert start < EXACT < drift(small, large)

"""Scale-out: when a mixture computes what the feed-forward did, whose gradients its experts get, and what differs."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from modules.config import ModelConfig
from modules.errors import InputError
from modules.growth.stage import GrowthStage, GrowthTarget
from modules.growth.transition import build_transition, materialize, network_source, target_config
from modules.layers.transformer import Transformer
from modules.moe_config import CapacityConfig, MoEConfig, RouterConfig
from modules.optim import OptimizerConfig, build_optimizer
from tests.unit.growth_helpers import (
    EXACT,
    drift,
    gradients_of,
    grow,
    make,
    paths_part,
    stage,
    train_step,
    transition_of,
)

DENSE = ModelConfig(vocab_size=20, dim=16, num_layers=2, num_heads=2, ffn_dim=48)
CHANGES = 1e-6
"""A change of logits that is no rounding."""


def dense(seed: int = 0, config: ModelConfig = DENSE) -> Transformer:
    torch.manual_seed(seed)
    return make(config)


def upcycled(moe: MoEConfig, upcycle: str = "copy", **options: Any) -> GrowthStage:
    return stage(GrowthTarget(moe=moe), upcycle=upcycle, **options)


def changes(old: Transformer, to: GrowthStage) -> tuple[bool, float]:
    """Whether the transition says that it is exact, and how much it changes."""
    transition = transition_of(old, to)
    return transition.is_exact, drift(old, materialize(transition.grown, "cpu"))


def chosen(network: Transformer, layer: int = 0) -> Tensor:
    """The experts [T, K] that each token takes."""
    seen: list[Tensor] = []
    routed = network.routed_layers()[layer]
    hook = routed.register_forward_hook(lambda m, x, y: seen.append(x[0].flatten(0, 1)))
    network(torch.arange(18).view(2, 9))
    hook.remove()
    return routed.router(seen[0]).topk(routed.router.moe.top_k, dim=-1).indices


mixtures = st.fixed_dictionaries(
    {
        "shards": st.sampled_from([1, 2, 3, 6]),
        "copies": st.integers(1, 4),
        "taken": st.integers(1, 4),
        "renormalize": st.booleans(),
        "score": st.sampled_from(["softmax", "softmax_of_top_k", "sigmoid"]),
        "scale": st.sampled_from([1.0, 2.5]),
        "bias": st.sampled_from([0.0, 0.01]),
        "groups": st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 3)]),
        "router_std": st.sampled_from([0.0, 0.02, 0.5]),
        "whole": st.sampled_from([True, True, False]),
    }
)


def mixture(shape: dict) -> MoEConfig:
    """E = G · copies; top-k of whole copies, or one less."""
    shards, copies, (groups, open_groups) = shape["shards"], shape["copies"], shape["groups"]
    num_experts, top_k = shards * copies, shards * min(shape["taken"], copies) - (not shape["whole"])
    renormalize = shape["renormalize"] or shape["score"] == "softmax_of_top_k"
    assume(top_k > 0 and num_experts % groups == 0 and open_groups * (num_experts // groups) >= top_k)
    router = RouterConfig(
        score=shape["score"],
        gate_scale=shape["scale"],
        bias_update_rate=shape["bias"],
        expert_groups=groups,
        top_groups=open_groups,
    )
    return MoEConfig(num_experts, top_k, expert_dim=48 // shards, renormalize=renormalize, router=router)


PLAIN = {"shards": 1, "copies": 4, "taken": 2, "renormalize": False, "score": "softmax", "scale": 1.0, "bias": 0.0}
PLAIN |= {"groups": (1, 1), "router_std": 0.5, "whole": True}


@settings(max_examples=80)
@example(PLAIN, 0)
@example(PLAIN | {"taken": 4}, 0)  # all gates of a softmax add up to 1
@example(PLAIN | {"router_std": 0.0}, 0)
@example(PLAIN | {"shards": 2, "renormalize": True, "copies": 3, "taken": 1, "router_std": 0.0}, 0)  # ties part shards
@example(PLAIN | {"shards": 2, "renormalize": True, "copies": 3, "groups": (3, 1), "taken": 1}, 0)
@example(PLAIN | {"shards": 2, "renormalize": True, "copies": 3, "groups": (2, 1), "taken": 1}, 0)  # groups part copies
@example(PLAIN | {"shards": 6, "renormalize": True, "copies": 1, "taken": 1}, 0)  # a split, and all of it
@given(mixtures, st.integers(0, 5))
def test_an_upcycle_knows_whether_it_is_exact(shape: dict, seed: int) -> None:
    moe = mixture(shape)
    says, change = changes(dense(seed), upcycled(moe, router_std=shape["router_std"], seed=seed))
    if says:
        assert change < EXACT
    elif shape["router_std"] > 0:  # of equal scores top-k may happen to take a whole copy
        assert change > CHANGES


@pytest.mark.parametrize("router_std", [0.0, 0.02, 1.0, 3.0])
@pytest.mark.parametrize("score", ["softmax", "softmax_of_top_k", "sigmoid"])
def test_renormalised_copies_are_exact_for_any_router(score: Any, router_std: float) -> None:
    router = RouterConfig(score=score, gate_scale=2.5)
    assert changes(dense(), upcycled(MoEConfig(6, 2, router=router), router_std=router_std))[1] < EXACT
    if router_std > 0:
        moe = MoEConfig(6, 4, expert_dim=24, router=router)
        assert changes(dense(), upcycled(moe, router_std=router_std))[1] < EXACT


@pytest.mark.parametrize(("renormalize", "score"), [(True, "softmax"), (False, "softmax"), (False, "sigmoid")])
def test_upcycling_by_copies(renormalize: bool, score: Any) -> None:
    old = dense(config=dataclasses.replace(DENSE, num_layers=4))
    moe = MoEConfig(4, 2, every=2, renormalize=renormalize, router=RouterConfig(score=score))
    new = grow(old, upcycled(moe, router_std=1.0))
    assert new.config.routed_layers == (1, 3)
    assert (drift(old, new) < EXACT) == renormalize
    assert changes(old, upcycled(moe, router_std=0.0)) == (True, pytest.approx(0, abs=EXACT))


@pytest.mark.parametrize("layers", [(0,), (2,), (0, 3)])
def test_chosen_layers_become_mixtures_and_others_stay(layers: tuple[int, ...]) -> None:
    old = dense(config=dataclasses.replace(DENSE, num_layers=4))
    new = grow(old, upcycled(MoEConfig(4, 2, layers=layers)))
    assert new.config.routed_layers == layers and drift(old, new) < EXACT
    for layer in set(range(4)) - set(layers):
        assert torch.equal(new.blocks[layer].feed_forward.up.weight, old.blocks[layer].feed_forward.up.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("num_experts", "top_k", "shards"), [(6, 2, 2), (12, 6, 3), (24, 12, 6), (48, 12, 6)])
def test_every_token_takes_whole_copies(num_experts: int, top_k: int, shards: int, dtype: torch.dtype) -> None:
    """Also where products are rounded: rows of equals have equal products."""
    new = grow(dense(), upcycled(MoEConfig(num_experts, top_k, expert_dim=48 // shards), router_std=0.5)).to(dtype)
    for layer in range(2):
        experts = chosen(new, layer)
        for row in experts:
            visits = torch.bincount(row // shards, minlength=num_experts // shards)
            assert set(visits.tolist()) <= {0, shards}
        shards_seen = torch.nn.functional.one_hot(experts % shards, shards).sum(1)
        assert (shards_seen == top_k // shards).all()
        assert len({tuple(sorted(row.tolist())) for row in experts}) > 1  # the router does route


@pytest.mark.parametrize(("top_k", "exact"), [(6, True), (4, False), (1, False)])
def test_a_split_is_exact_when_all_of_it_is_taken(top_k: int, exact: bool) -> None:
    """LLaMA-MoE: the experts are a partition of the feed-forward's neurons."""
    old, to = dense(), upcycled(MoEConfig(6, top_k, expert_dim=8))
    says, change = changes(old, to)
    assert says == exact == (change < EXACT)
    parts = grow(old, to).blocks[0].feed_forward.experts.gate
    assert torch.equal(parts.transpose(0, 1).flatten(1), old.blocks[0].feed_forward.gate.weight.T)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("shared", "shared_dim", "expert_dim"), [(1, None, 16), (1, 16, 32), (2, None, 16), (2, 8, 32), (1, 16, None)]
)
def test_shared_experts_take_the_first_neurons(
    shared: int, shared_dim: int | None, expert_dim: int | None, gated: bool
) -> None:
    old = dense()
    shards = 1 if expert_dim is None else (48 - shared * (shared_dim or expert_dim)) // expert_dim
    moe = MoEConfig(
        4 * shards, 2 * shards, expert_dim, num_shared_experts=shared, shared_expert_dim=shared_dim, shared_gate=gated
    )
    says, change = changes(old, upcycled(moe, router_std=0.5))
    assert says and change < EXACT
    layer = grow(old, upcycled(moe)).blocks[0].feed_forward
    size = shared * (shared_dim or expert_dim or 0)
    assert torch.equal(layer.shared.gate.weight, old.blocks[0].feed_forward.gate.weight[:size])
    routed = layer.experts.gate[0]
    assert torch.equal(routed, old.blocks[0].feed_forward.gate.weight[size : size + routed.shape[1]].T)


def test_the_cube_root_on_all_three_matrices_is_not_exact() -> None:
    """Megatron's scale, which is meant for products of three: SwiGLU does not hand a factor on its gate on."""
    old = dense()
    new = grow(old, upcycled(MoEConfig(8, 4, expert_dim=24), router_std=0.5))
    assert drift(old, new) < EXACT
    with torch.no_grad():
        for layer in new.routed_layers():
            layer.experts.gate.mul_(2 ** (1 / 3))
            for matrix in (layer.experts.up, layer.experts.down):
                matrix.mul_(2 ** (1 / 3 - 1 / 2))
    assert drift(old, new) > 1e-2


@pytest.mark.parametrize(
    ("moe", "exact"),
    [
        (MoEConfig(4, 2, capacity=CapacityConfig(factor=0.5, at_evaluation=True)), True),
        (MoEConfig(4, 2, router=RouterConfig(score="sigmoid", bias_update_rate=1e-3)), True),
        (MoEConfig(4, 2, router=RouterConfig(gate_scale=2.5)), True),
        (MoEConfig(4, 2, renormalize=False), False),
        (MoEConfig(4, 2, router=RouterConfig("gshard"), capacity=CapacityConfig()), False),  # they add up to 1 - 1e-9
    ],
)
def test_copies_are_exact_where_gates_add_up_to_one(moe: MoEConfig, exact: bool) -> None:
    old = dense()
    says, change = changes(old, upcycled(moe))
    assert says == exact and (not exact or change < EXACT)
    for layer in grow(old, upcycled(moe)).routed_layers():
        assert layer.router.selection_bias_E is None or layer.router.selection_bias_E.abs().max() == 0


# Copies that differ


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_drop_upcycling_redraws_one_set_of_neurons_in_all_three_matrices(ratio: float, shards: int) -> None:
    old = dense(config=dataclasses.replace(DENSE, num_layers=1))
    moe = MoEConfig(4, 2, expert_dim=48 // shards)
    plain = grow(old, upcycled(moe)).blocks[0].feed_forward.experts
    experts = grow(old, upcycled(moe, "drop", drop_ratio=ratio)).blocks[0].feed_forward.experts
    sets = []
    for e in range(4):
        changed = [(experts.gate[e] != plain.gate[e]).any(0), (experts.up[e] != plain.up[e]).any(0)]
        changed.append((experts.down[e] != plain.down[e]).any(1))
        assert changed[0].sum() == round(ratio * 48 / shards)
        assert torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])
        sets.append(tuple(changed[0].nonzero().flatten().tolist()))
    assert len(set(sets)) == (1 if ratio == 1 else 4)


def test_redrawn_neurons_are_as_large_as_those_they_replace() -> None:
    old = dense(config=dataclasses.replace(DENSE, dim=64, ffn_dim=256, num_layers=1))
    with torch.no_grad():
        old.blocks[0].feed_forward.up.weight.add_(0.1)  # a mean of its own
    plain, drawn = (
        grow(old, upcycled(MoEConfig(2, 1), kind)).blocks[0].feed_forward.experts.up for kind in ("copy", "drop")
    )
    new, gone = drawn[drawn != plain], plain[drawn != plain]
    assert new.mean().item() == pytest.approx(gone.mean().item(), abs=0.01)
    assert new.std().item() == pytest.approx(gone.std().item(), rel=0.03)


def test_expert_noise_has_its_size() -> None:
    old = dense(config=dataclasses.replace(DENSE, dim=32, ffn_dim=128, num_layers=1))
    plain, noisy = (
        grow(old, upcycled(MoEConfig(4, 2), kind, expert_noise=0.2)).blocks[0].feed_forward.experts
        for kind in ("copy", "noise")
    )
    for before, after in zip(plain.parameters(), noisy.parameters(), strict=True):
        for e in range(4):
            assert ((after - before)[e].std() / before[e].std()).item() == pytest.approx(0.2, rel=0.05)
        assert not torch.equal((after - before)[0], (after - before)[1])


@pytest.mark.parametrize(
    ("upcycle", "options", "exact"),
    [
        ("drop", {"drop_ratio": 0.5}, False),
        ("drop", {"drop_ratio": 0.01}, True),  # of 48 neurons none
        ("noise", {"expert_noise": 0.01}, False),
        ("noise", {"expert_noise": 0.0}, True),
    ],
)
def test_what_differs_is_not_exact(upcycle: str, options: dict, exact: bool) -> None:
    says, change = changes(dense(), upcycled(MoEConfig(4, 2), upcycle, **options))
    assert says == exact == (change < EXACT)


@pytest.mark.parametrize(("upcycle", "parts"), [("copy", False), ("drop", True), ("noise", True)])
@pytest.mark.parametrize("renormalize", [True, False])
def test_experts_part(upcycle: str, parts: bool, renormalize: bool) -> None:
    """Without balance and z-loss. Copies would part as well if they saw different tokens; here all see all."""
    new = grow(dense(), upcycled(MoEConfig(3, 3, renormalize=renormalize), upcycle, router_std=0.0))
    optimizer = build_optimizer(new, OptimizerConfig(lr=1e-2), {})
    for _ in range(3):
        train_step(new, optimizer, torch.randint(20, (2, 9)))
    gate = new.blocks[0].feed_forward.experts.gate
    assert ((gate[0] - gate[1]).abs().max().item() > 1e-4) == parts


# Gradients and optimizer state


def slope_of_router(old: Transformer, to: GrowthStage) -> float:
    slopes = gradients_of(grow(old, to), torch.arange(18).view(2, 9))
    return slopes["blocks.0.feed_forward.router.weight"].abs().max().item()


def test_the_router_learns_nothing_from_experts_that_agree() -> None:
    """The language-model loss of renormalised equal experts does not depend on the router at all."""
    old, moe = dense(), MoEConfig(4, 2)
    assert slope_of_router(old, upcycled(moe)) < 1e-16
    assert slope_of_router(old, upcycled(MoEConfig(8, 4, expert_dim=24))) > CHANGES  # shards do not agree
    assert slope_of_router(old, upcycled(moe, "drop")) > CHANGES
    assert slope_of_router(old, upcycled(moe, "noise")) > CHANGES
    assert slope_of_router(old, upcycled(dataclasses.replace(moe, renormalize=False))) > CHANGES


@pytest.mark.parametrize(
    ("moe", "scale"),
    [
        (MoEConfig(4, 2), 1.0),
        (MoEConfig(8, 4, expert_dim=24), 2.0),
        (MoEConfig(6, 3, expert_dim=16, router=RouterConfig(score="sigmoid", gate_scale=2.5)), 3 / 2.5),
    ],
)
def test_the_experts_gradients_add_up_to_the_dense_gradient(moe: MoEConfig, scale: float) -> None:
    """Σ_e s · ∂L/∂(s W_e), s = sqrt(α) on up and down, is the gradient of the shard that the experts hold."""
    old, tokens = dense(), torch.randint(20, (2, 9))
    transition = transition_of(old, upcycled(moe, router_std=0.5))
    assert transition.is_exact
    before = gradients_of(old, tokens)
    after = gradients_of(materialize(transition.grown, "cpu"), tokens)
    shards = 48 // (moe.expert_dim or 48)
    for part, axis, s in (("gate", 1, 1.0), ("up", 1, scale**0.5), ("down", 0, scale**0.5)):
        slopes = after[f"blocks.0.feed_forward.experts.{part}"].unflatten(0, (-1, shards)).sum(0) * s
        joined = torch.cat(list(slopes), dim=axis)
        torch.testing.assert_close(joined, before[f"blocks.0.feed_forward.{part}.weight"].T, rtol=0, atol=EXACT)


@pytest.mark.parametrize("moe", [MoEConfig(4, 2), MoEConfig(8, 4, expert_dim=24), MoEConfig(6, 6, renormalize=False)])
def test_carried_first_moments_add_up_to_the_dense_ones(moe: MoEConfig) -> None:
    """Which expert had which part of them is not known: each gets the same."""
    old = dense()
    before = gradients_of(old, torch.randint(20, (2, 9)))
    state = {n: {"exp_avg": g, "exp_avg_sq": g.square(), "step": torch.tensor(3.0)} for n, g in before.items()}
    grown = build_transition(network_source(old, state, {}), upcycled(moe)).grown
    shards, dense_up = 48 // (moe.expert_dim or 48), before["blocks.0.feed_forward.up.weight"].T
    carried, weight = (read("blocks.0.feed_forward.experts.up") for read in (grown.moments, grown.weight))
    scale = (weight[0] / old.blocks[0].feed_forward.up.weight.T[:, : 48 // shards]).mean()
    summed = carried.first.unflatten(0, (-1, shards)).sum(0) * scale
    torch.testing.assert_close(torch.cat(list(summed), dim=1), dense_up, rtol=0, atol=EXACT)
    assert carried.step == 3.0 and (carried.second >= 0).all()


@pytest.mark.parametrize("moe", [MoEConfig(4, 4), MoEConfig(6, 6, expert_dim=16, renormalize=False)])
def test_a_mixture_whose_experts_all_work_alike_follows_the_dense_model(moe: MoEConfig) -> None:
    """All tokens visit all experts, by a router of zeros that has no gradient: then, and only then, every expert's
    gradient is 1 / E of the dense one, as the state is mapped."""
    settings = OptimizerConfig(lr=1e-2, weight_decay=0.1, eps=1e-3)
    apart = paths_part(dense(), upcycled(moe, router_std=0.0), settings)
    if moe.expert_dim is None:
        assert max(apart) < 1e-9
    else:  # shards do not agree, and the router learns
        assert apart[0] > CHANGES


# Duplication


def mixture_of(moe: MoEConfig, seed: int = 0) -> Transformer:
    return dense(seed, dataclasses.replace(DENSE, ffn_dim=16, moe=moe))


duplicates = st.fixed_dictionaries(
    {
        "experts": st.sampled_from([1, 2, 4, 6]),
        "top_k": st.integers(1, 3),
        "times": st.integers(1, 3),
        "more": st.sampled_from([0, 0, 0, -1, 1]),
        "renormalize": st.booleans(),
        "score": st.sampled_from(["softmax", "softmax_of_top_k", "sigmoid"]),
        "scale": st.sampled_from([1.0, 2.5]),
        "bias": st.sampled_from([0.0, 0.01]),
        "groups": st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 2), (6, 3)]),
        "shared": st.booleans(),
    }
)


@settings(max_examples=80)
@example({"experts": 4, "top_k": 2, "times": 2, "more": 0, "renormalize": True, "score": "softmax", "scale": 1.0,
          "bias": 0.0, "groups": (2, 1), "shared": False}, 3)  # fmt: skip
@given(duplicates, st.integers(0, 5))
def test_duplication_knows_whether_it_is_exact(shape: dict, seed: int) -> None:
    experts, top_k, times, (groups, open_groups) = (shape[k] for k in ("experts", "top_k", "times", "groups"))
    assume(experts % groups == 0 and open_groups * (experts // groups) >= top_k and top_k <= experts)
    router = RouterConfig(
        score=shape["score"],
        gate_scale=shape["scale"],
        bias_update_rate=shape["bias"],
        expert_groups=groups,
        top_groups=open_groups,
    )
    moe = MoEConfig(
        experts,
        top_k,
        renormalize=shape["renormalize"] or shape["score"] == "softmax_of_top_k",
        router=router,
        num_shared_experts=int(shape["shared"]),
    )
    more_k = times * top_k + shape["more"]
    assume(top_k <= more_k <= open_groups * (times * experts // groups) and (times > 1 or more_k > top_k))
    old = mixture_of(moe, seed)
    says, change = changes(old, upcycled(dataclasses.replace(moe, num_experts=times * experts, top_k=more_k)))
    if says:
        assert change < EXACT
    elif groups == open_groups:  # groups of experts may happen to be chosen as before
        assert change > CHANGES


def test_duplication_within_groups_of_experts_is_not_exact() -> None:
    """A group is judged by its two best: by the best one and its copy, after duplication."""
    router = RouterConfig(expert_groups=2, top_groups=1)
    moe = MoEConfig(8, 2, router=router)
    says, change = changes(mixture_of(moe), upcycled(dataclasses.replace(moe, num_experts=16, top_k=4)))
    assert not says and change > CHANGES
    each = dataclasses.replace(moe, router=RouterConfig(expert_groups=8, top_groups=3))
    says, change = changes(mixture_of(each), upcycled(dataclasses.replace(each, num_experts=16, top_k=4)))
    assert says and change < EXACT


@pytest.mark.parametrize(("upcycle", "exact"), [("copy", True), ("drop", False), ("noise", False)])
def test_only_new_experts_are_varied(upcycle: str, exact: bool) -> None:
    old = mixture_of(MoEConfig(4, 2))
    to = upcycled(MoEConfig(12, 6), upcycle)
    says, change = changes(old, to)
    assert says == exact == (change < EXACT)
    before, after = (network.blocks[0].feed_forward.experts.up for network in (old, grow(old, to)))
    for expert in range(12):
        assert torch.equal(after[expert], before[expert // 3]) == (exact or expert % 3 == 0)


DUPLICATED = [
    (MoEConfig(4, 2), 1.0),
    (MoEConfig(4, 2, renormalize=False), 1.0),
    (MoEConfig(4, 2, router=RouterConfig(score="sigmoid", bias_update_rate=0.01)), 1.0),
    (MoEConfig(4, 2, renormalize=False, router=RouterConfig(score="sigmoid")), 1 / 3),
]


@pytest.mark.parametrize(("moe", "alpha"), DUPLICATED)
def test_copies_gradients_add_up_to_their_experts(moe: MoEConfig, alpha: float) -> None:
    old, tokens = mixture_of(moe), torch.randint(20, (2, 9))
    before = gradients_of(old, tokens)
    state = {n: {"exp_avg": g, "exp_avg_sq": g.square(), "step": torch.tensor(1.0)} for n, g in before.items()}
    to = upcycled(dataclasses.replace(moe, num_experts=12, top_k=6))
    grown = build_transition(network_source(old, state, {}), to).grown
    for name, slope in gradients_of(materialize(grown, "cpu"), tokens).items():
        carried = grown.moments(name)
        torch.testing.assert_close(carried.first, slope, rtol=0, atol=EXACT, msg=lambda text, n=name: f"{n}: {text}")
        torch.testing.assert_close(carried.second, slope.square(), rtol=0, atol=EXACT)
        if "router" in name or ".experts." in name:
            s = alpha**0.5 if name.endswith(("up", "down")) else 1.0
            torch.testing.assert_close(slope.unflatten(0, (4, 3)).sum(1) * s, before[name], rtol=0, atol=EXACT)


@pytest.mark.parametrize(("moe", "alpha"), DUPLICATED)
def test_a_duplicated_mixture_follows_its_source(moe: MoEConfig, alpha: float) -> None:
    settings = OptimizerConfig(lr=1e-2, weight_decay=0.1, eps=1e-3)
    to = upcycled(dataclasses.replace(moe, num_experts=12, top_k=6))
    assert max(paths_part(mixture_of(moe), to, settings)) < 1e-9


@pytest.mark.parametrize(
    ("moe", "words"),
    [
        (MoEConfig(8, 2, expert_dim=32), "changes more of a mixture than num_experts"),
        (MoEConfig(8, 2, every=2), "changes more of a mixture than num_experts"),
        (MoEConfig(6, 2), "num_experts=6, top_k=2 must be a multiple of the source's 4 experts"),
        (MoEConfig(8, 1), "at least its top_k=2"),
    ],
)
def test_a_mixture_only_gets_more_experts(moe: MoEConfig, words: str) -> None:
    with pytest.raises(InputError, match=words):
        target_config(dataclasses.replace(DENSE, moe=MoEConfig(4, 2)), stage(GrowthTarget(moe=moe)))


def test_a_mixture_may_become_deeper_and_get_more_experts_at_once() -> None:
    """Deepening names routed layers one by one; a recipe need not."""
    old = mixture_of(MoEConfig(4, 2))
    transition = transition_of(old, stage(GrowthTarget(num_layers=4, moe=MoEConfig(8, 4)), upcycle="copy"))
    assert transition.kinds == ["deepen", "upcycle"] and transition.config.routed_layers == (0, 1, 2, 3)
    assert transition.is_exact and drift(old, materialize(transition.grown, "cpu")) < EXACT


def test_seeds_decide_what_is_drawn() -> None:
    old, moe = dense(), MoEConfig(4, 2)
    for upcycle in ("copy", "drop", "noise"):
        draws = [grow(old, upcycled(moe, upcycle, seed=seed)).state_dict() for seed in (0, 0, 1)]
        assert all(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])
        assert any(not torch.equal(draws[0][name], draws[2][name]) for name in draws[0])

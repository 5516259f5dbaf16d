"""Optimizer state of wider models, and what makes copies part."""

from typing import Any

import pytest
import torch

from modules.config import ModelConfig
from modules.growth.maps import MapRules
from modules.growth.roles import Axis
from modules.growth.stage import GrowthTarget
from modules.growth.transition import build_transition, materialize, network_source
from modules.optim import OptimizerConfig, build_optimizer
from tests.unit.growth_helpers import (
    EXACT,
    ROUTED,
    drift,
    gradients_of,
    grow,
    make,
    paths_part,
    stage,
    train_step,
    transition_of,
)


@pytest.mark.parametrize("noise", ["projection", "pairs"])
@pytest.mark.parametrize("copies", ["even", "random"])
def test_split_noise_has_its_size_and_adds_up_to_zero(noise: Any, copies: Any) -> None:
    torch.manual_seed(0)
    old = make(ModelConfig(20, dim=32, num_layers=1, num_heads=4, ffn_dim=64))
    plain = grow(old, stage(GrowthTarget(ffn_dim=160), copies=copies)).blocks[0].feed_forward.down.weight
    to = stage(GrowthTarget(ffn_dim=160), copies=copies, split_noise=0.2, noise=noise)
    transition = transition_of(old, to)
    added = materialize(transition.grown, "cpu").blocks[0].feed_forward.down.weight - plain
    index = transition.grown.maps[Axis.HIDDEN_IN].index  # type: ignore[attr-defined]
    sums = torch.zeros(32, 64, dtype=torch.float64).index_add_(1, index, added)
    assert sums.abs().max() < EXACT < 1e-3 < added.abs().max()
    count = torch.bincount(index)[index]
    if noise == "projection":  # c draws, less their mean
        drawn, spread = count > 1, (1 - 1 / count[count > 1]).sqrt()
    else:
        drawn = added.abs().amax(0) > 0
        spread = torch.ones(int(drawn.sum()))
        assert (count[~drawn] % 2 == 1).all()
    sizes = added[:, drawn].square().mean().sqrt() / spread.square().mean().sqrt()
    assert (sizes / plain.std()).item() == pytest.approx(0.2, rel=0.05)


BREAKERS: dict[str, dict[str, Any]] = {
    "none": {},
    "random, which is none": {"copies": "random"},
    "projection": {"split_noise": 0.2},
    "pairs": {"split_noise": 0.2, "noise": "pairs"},
    "lemon": {"width": "lemon"},
    "aki": {"width": "aki"},
    "fpi, which is none": {"width": "fpi"},
}


@pytest.mark.parametrize("breaker", BREAKERS)
def test_copies_part_only_with_a_breaker(breaker: str) -> None:
    torch.manual_seed(0)
    old = make(ModelConfig(vocab_size=20, dim=16, num_layers=2, num_heads=2, ffn_dim=24))
    transition = transition_of(old, stage(GrowthTarget(ffn_dim=48), **BREAKERS[breaker]))
    new = materialize(transition.grown, "cpu")
    optimizer = build_optimizer(new, OptimizerConfig(lr=1e-2), {})
    for _ in range(3):
        train_step(new, optimizer, torch.randint(20, (2, 9)))
    index = transition.grown.maps[Axis.HIDDEN_OUT].index  # type: ignore[attr-defined]
    gate = new.blocks[0].feed_forward.gate.weight
    source = torch.arange(24)
    apart = (gate[24:] - gate[source][index[24:]]).abs().max().item()
    assert apart < 1e-12 if breaker.endswith("none") else apart > 1e-4


# Optimizer state


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kv", "norms", "routed"),
    [(1, "prenorm", "none"), (4, "prenorm", "none"), (4, "hybridnorm", "shared"), (1, "postnorm", "plain")],
)
@pytest.mark.parametrize(("width", "copies"), [("iso", "even"), ("iso", "powers"), ("fpi", "even")])
def test_mapped_state_follows_the_small_model_for_ten_steps(
    tied: bool, width: Any, copies: Any, kv: int, norms: Any, routed: str
) -> None:
    """Integer ratios in every width: the grown model's Adam path is the small model's."""
    torch.manual_seed(0)
    small = make(
        ModelConfig(
            vocab_size=20,
            dim=16,
            num_layers=2,
            num_heads=4,
            num_kv_heads=kv,
            ffn_dim=24,
            tie_embeddings=tied,
            qkv_bias=True,
            o_bias=True,
            qk_norm=norms == "postnorm" or (norms == "prenorm" and kv == 4),
            qk_norm_scope="head" if norms == "prenorm" else "projection",
            norm_structure=norms,
            moe=ROUTED[routed],
        )
    )
    to = GrowthTarget(dim=64, num_heads=8, num_kv_heads=kv if kv == 1 else 8, ffn_dim=48 if copies == "powers" else 72)
    settings = OptimizerConfig(lr=1e-2, weight_decay=0.1, eps=1e-3)
    assert max(paths_part(small, stage(to, width=width, copies=copies), settings)) < 1e-9


def test_fresh_state_leaves_the_small_models_path() -> None:
    torch.manual_seed(0)
    small = make(ModelConfig(20, dim=16, num_layers=2, num_heads=4))
    settings = OptimizerConfig(lr=1e-2, weight_decay=0.1, eps=1e-3)
    large = grow(small, stage(GrowthTarget(dim=64)))
    assert drift(small, large) < EXACT
    for network in (small, large):
        train_step(network, build_optimizer(network, settings, {}), torch.arange(18).view(2, 9))
    assert drift(small, large) > 1e-4


def test_state_follows_wherever_every_source_has_the_same_number_of_copies() -> None:
    """A random map with whole counts, in any order, and query heads inside their groups."""
    torch.manual_seed(0)
    small = make(ModelConfig(20, dim=4, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, ffn_dim=3))
    for seed in range(2000):
        rules = MapRules("random", seed=seed)
        axes = [("residual", 4, 8), ("hidden", 3, 6), ("heads", 2, 4)]
        if all(len(rules.copies(*axis).count.unique()) == 1 for axis in axes):
            break
    shuffled = rules.copies("residual", 4, 8).index
    assert not torch.equal(shuffled, torch.arange(8) % 4)
    settings = OptimizerConfig(lr=1e-2, weight_decay=0.1, eps=1e-3)
    to = stage(GrowthTarget(dim=8, ffn_dim=6, num_heads=8), copies="random", seed=seed)
    assert max(paths_part(small, to, settings)) < 1e-9


def test_repeated_key_value_heads_get_gradients_of_their_own() -> None:
    """Each serves other query heads: they part by themselves, and only their gradients' sum is the source's."""
    torch.manual_seed(0)
    old = make(ModelConfig(20, dim=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4))
    new, tokens = grow(old, stage(GrowthTarget(num_kv_heads=4))), torch.randint(20, (2, 9))
    before, after = gradients_of(old, tokens), gradients_of(new, tokens)
    for part in ("k_proj", "v_proj"):
        slopes = after[f"blocks.0.attention.{part}.weight"].view(2, 2, 4, 16)  # source, repetition
        torch.testing.assert_close(
            slopes.sum(1).flatten(0, 1), before[f"blocks.0.attention.{part}.weight"], rtol=0, atol=EXACT
        )
        assert (slopes[:, 0] - slopes[:, 1]).abs().max() > 1e-4


def test_first_moments_are_the_wider_models_gradients() -> None:
    """For any map, a wider model's gradients are the source's times the factors that moments get."""
    torch.manual_seed(0)
    old = make(ModelConfig(20, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=24, qkv_bias=True))
    tokens = torch.randint(20, (2, 9))
    before = gradients_of(old, tokens)
    state = {
        name: {"exp_avg": slope, "exp_avg_sq": slope.square(), "step": torch.tensor(1.0)}
        for name, slope in before.items()
    }
    to = stage(GrowthTarget(dim=40, num_heads=10, ffn_dim=40), copies="random")
    grown = build_transition(network_source(old, state, {}), to).grown
    for name, slope in gradients_of(materialize(grown, "cpu"), tokens).items():
        carried = grown.moments(name)
        torch.testing.assert_close(slope, carried.first, rtol=0, atol=EXACT)
        torch.testing.assert_close(slope.square(), carried.second, rtol=0, atol=EXACT)


def test_seeds_decide_what_is_drawn() -> None:
    torch.manual_seed(0)
    old = make(ModelConfig(20, dim=16, num_layers=1, num_heads=2))
    for options in ({"copies": "random"}, {"split_noise": 0.1}, {"width": "zero"}, {"width": "lemon"}):
        draws = [grow(old, stage(GrowthTarget(dim=40), seed=seed, **options)).state_dict() for seed in (0, 0, 1)]
        torch.rand(1)  # the global generator has no part in it
        assert all(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])
        assert any(not torch.equal(draws[0][name], draws[2][name]) for name in draws[0])

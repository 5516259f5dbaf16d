"""Transitions: operations in a chain, what is carried, what is refused, and how stages are written and named."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from app.commands.grow import read_recipe
from modules.config import ModelConfig
from modules.errors import InputError
from modules.growth.stage import GrowthStage, GrowthTarget
from modules.growth.transition import (
    apply_stage,
    build_transition,
    grown_state,
    materialize,
    network_source,
    target_config,
)
from modules.moe_config import MoEConfig, RouterConfig
from modules.optim import OptimizerConfig, ParameterFactors, build_optimizer
from tests.unit.growth_helpers import (
    EXACT,
    config_of,
    drift,
    grow,
    grows,
    make,
    model_shapes,
    more_width,
    stage,
    state_of,
    target_of,
    train_step,
    transition_of,
)

BASE = ModelConfig(vocab_size=20, dim=48, num_layers=4, num_heads=3)


@settings(max_examples=50)
@given(
    st.fixed_dictionaries(model_shapes | more_width | {"more_layers": st.integers(1, 3)}),
    st.booleans(),
    st.sampled_from(["even", "random", "powers"]),
)
def test_widening_deepening_and_scaling_out_at_once_is_exact(shape: dict, scales_out: bool, copies: Any) -> None:
    assume(grows(shape))
    torch.manual_seed(shape["seed"])
    old, target = make(config_of(shape)), target_of(shape)
    if scales_out and shape["moe"] == "none":
        target = dataclasses.replace(target, moe=MoEConfig(4, 2))
    transition = transition_of(old, stage(target, split_noise=0.3, copies=copies, upcycle="copy"))
    new = materialize(transition.grown, "cpu")
    assert transition.is_exact and drift(old, new) < EXACT
    assert new.config.dim == target.dim and new.config.num_layers == target.num_layers
    assert (new.config.moe is None) == (old.config.moe is None and target.moe is None)


def test_new_blocks_and_routers_start_with_fresh_state() -> None:
    torch.manual_seed(0)
    old = make(ModelConfig(vocab_size=20, dim=16, num_layers=2, num_heads=2))
    optimizer = build_optimizer(old, OptimizerConfig(), {})
    train_step(old, optimizer, torch.randint(20, (2, 9)))
    to = stage(GrowthTarget(num_layers=3, moe=MoEConfig(2, 1, layers=(0, 2))), upcycle="drop", drop_ratio=0.5)
    transition = build_transition(network_source(old, state_of(old, optimizer), {}), to)
    new = materialize(transition.grown, "cpu")
    carried = grown_state(transition.grown, new)
    assert transition.kinds == ["deepen", "upcycle"] and transition.methods == ["zero_block", "drop"]
    fresh = {name for name, _ in new.named_parameters() if name not in carried}
    assert {name.split(".")[1] for name in fresh if "router" not in name} == {"1"}
    assert {name for name in fresh if "router" in name} == {f"blocks.{i}.feed_forward.router.weight" for i in (0, 2)}
    for name, tensors in carried.items():
        assert tensors["exp_avg"].shape == dict(new.named_parameters())[name].shape
        assert (tensors["exp_avg_sq"] >= 0).all() and tensors["step"].item() == 1.0


def test_factors_multiply_through_stages() -> None:
    old = make(ModelConfig(vocab_size=20, dim=16, num_layers=1, num_heads=2))
    before = {"blocks.0.feed_forward.down.weight": ParameterFactors(0.5, 2.0, 1.0)}
    chain = build_transition(network_source(old, {}, before), stage(GrowthTarget(ffn_dim=96))).grown
    assert chain.factors("blocks.0.feed_forward.down.weight") == ParameterFactors(0.25, 4.0, 1.0)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (GrowthTarget(dim=32), "growth target dim=32 is smaller than its source's dim=48"),
        (GrowthTarget(num_layers=2), "num_layers=2 is smaller"),
        (GrowthTarget(ffn_dim=64), "ffn_dim=64 is smaller"),
        (GrowthTarget(num_heads=4, num_kv_heads=3), "num_heads=4 is not divisible by num_kv_heads=3"),
        (GrowthTarget(num_kv_heads=6, num_heads=6, dim=40), "dim=40 is smaller"),
        (GrowthTarget(dim=52, moe=MoEConfig(4, 2)), "dim=52 of a routed layer is not a multiple of 8"),
        (
            GrowthTarget(moe=MoEConfig(4, 2, expert_dim=48)),
            "moe.expert_dim=48 does not divide the 128 hidden neurons",
        ),
        (GrowthTarget(moe=MoEConfig(5, 2, expert_dim=32)), "num_experts=5 is no multiple of the 4 shards"),
        (GrowthTarget(num_layers=4), "changes nothing"),
    ],
)
def test_targets_that_cannot_be_reached_are_refused(target: GrowthTarget, words: str) -> None:
    with pytest.raises(InputError) as caught:
        target_config(BASE, stage(target))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("heads", "kv"), [(10, 5), (9, 3)])
def test_groups_that_neither_stay_whole_nor_divide_are_refused(heads: int, kv: int) -> None:
    """Two groups of four query heads divide into eight of one, not into five of two."""
    grouped = ModelConfig(vocab_size=20, dim=16, num_layers=1, num_heads=8, num_kv_heads=2, head_dim=4)
    assert target_config(grouped, stage(GrowthTarget(num_kv_heads=8))).kv_heads == 8
    with pytest.raises(InputError, match="neither stay whole nor divide"):
        target_config(grouped, stage(GrowthTarget(num_heads=heads, num_kv_heads=kv)))


def test_a_head_keeps_its_channels() -> None:
    assert target_config(BASE, stage(GrowthTarget(dim=56))).head_size == 16
    assert target_config(BASE, stage(GrowthTarget(dim=64, num_heads=4))).head_dim is None


def test_growing_draws_nothing_from_the_global_generators() -> None:
    torch.manual_seed(0)
    old = make(dataclasses.replace(BASE, num_layers=2))
    target = GrowthTarget(dim=64, ffn_dim=256, num_layers=3, moe=MoEConfig(4, 2))
    before = torch.get_rng_state()
    grown = [apply_stage(network_source(old, {}, {}), stage(target, copies="random", split_noise=0.1), "cpu")]
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    grown.append(apply_stage(network_source(old, {}, {}), stage(target, copies="random", split_noise=0.1), "cpu"))
    first, second = (one.network.state_dict() for one in grown)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = grow(old, stage(target, copies="random", split_noise=0.1, seed=1)).state_dict()
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


# Stages


@pytest.mark.parametrize(
    "fields",
    [
        {"at_step": 1, "at_tokens": 5},
        {"at_step": 0},
        {"at_tokens": 0},
        {"at_step": 1, "drop_ratio": 0.0},
        {"at_step": 1, "drop_ratio": 1.5},
        {"at_step": 1, "split_noise": -0.1},
        {"at_step": 1, "expert_noise": float("inf")},
        {"at_step": 1, "router_std": float("nan")},
    ],
)
def test_stages_that_make_no_sense_are_refused(fields: dict) -> None:
    with pytest.raises(InputError):
        GrowthStage(GrowthTarget(dim=96), **fields)


def test_training_settings_do_not_name_a_transition() -> None:
    plain, heavy = (stage(GrowthTarget(moe=MoEConfig(4, 2, balance_loss_weight=w))).identity for w in (0.01, 1.0))
    assert plain == heavy
    biased = [
        stage(GrowthTarget(moe=MoEConfig(4, 2, router=RouterConfig(bias_update_rate=r)))).identity for r in (1e-3, 1e-2)
    ]
    assert biased[0] == biased[1] != plain
    assert stage(GrowthTarget(moe=MoEConfig(4, 1))).identity != plain


NAMES = [
    (GrowthStage(GrowthTarget(dim=96, num_heads=6), at_step=300), "target=(dim=96, num_heads=6), at_step=300"),
    (
        GrowthStage(GrowthTarget(num_layers=6), at_tokens=5000, depth="stack", seed=3),
        "target=(num_layers=6), at_tokens=5000, depth=stack, seed=3",
    ),
    (
        GrowthStage(GrowthTarget(moe=MoEConfig(4, 1)), at_step=5, upcycle="copy", router_std=0.1),
        "target=(moe=(num_experts=4, top_k=1)), at_step=5, upcycle=copy, router_std=0.1",
    ),
    (
        GrowthStage(GrowthTarget(dim=96), at_step=5, width="iso", depth="zero_block", upcycle="drop", drop_ratio=0.5),
        "target=(dim=96), at_step=5",
    ),
    (
        GrowthStage(GrowthTarget(dim=96), at_step=5, split_noise=0.1, copies="powers", optimizer_state="reset"),
        "target=(dim=96), at_step=5, copies=powers, split_noise=0.1, optimizer_state=reset",
    ),
]


@pytest.mark.parametrize(("given_stage", "name"), NAMES)
def test_names_of_transitions_stay_what_they_were(given_stage: GrowthStage, name: str) -> None:
    """Old checkpoints hold them: options that came later must not change them."""
    assert given_stage.identity == name


RECIPE: list[dict[str, Any]] = [
    {"target": {"dim": 96, "ffn_dim": 256}, "at_step": 3, "width": "lemon", "copies": "random", "seed": 7},
    {"target": {"dim": 96}, "at_step": 4, "split_noise": 0.2, "noise": "pairs", "copies": "powers"},
    {
        "target": {"dim": 96, "num_layers": 8},
        "at_tokens": 100,
        "width": "aki",
        "aki_scope": "ffn_heads",
        "aki_consumers": "next",
        "depth": "interpolate",
    },
    {"target": {"num_layers": 6}, "at_step": 9, "depth": "zero_block", "new_layers": [0, 5]},
    {
        "target": {"moe": {"num_experts": 8, "top_k": 4, "expert_dim": 64, "router": {"score": "sigmoid"}}},
        "at_step": 10,
        "upcycle": "noise",
        "expert_noise": 0.05,
        "router_std": 0.0,
    },
    {"target": {"moe": {"num_experts": 8}}, "at_step": 11, "upcycle": "drop", "drop_ratio": 0.25},
    {"target": {"dim": 96}, "at_step": 12, "width": "zero", "optimizer_state": "reset"},
    {"target": {"dim": 96}, "at_step": 12, "width": "fpi"},
]


def test_every_field_of_a_stage_comes_back_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"growth": {"stages": RECIPE}}), encoding="utf-8")
    for found, record in zip(read_recipe(path), RECIPE, strict=True):
        for name, value in record.items():
            if name != "target":
                assert getattr(found, name) == (tuple(value) if isinstance(value, list) else value)
        wanted = dict(record["target"])
        moe = wanted.pop("moe", None)
        assert found.target.widths() == {k: v for k, v in wanted.items() if k != "num_layers"}
        assert found.target.num_layers == wanted.get("num_layers")
        assert found.target.moe == (None if moe is None else MoEConfig.from_dict(moe))
        again = tmp_path / "again.yaml"
        written = {k: v for k, v in dataclasses.asdict(found).items() if v is not None}
        again.write_text(yaml.safe_dump({"growth": {"stages": [_plain(written)]}}), encoding="utf-8")
        assert read_recipe(again) == [found] and read_recipe(again)[0].identity == found.identity


def _plain(value: Any) -> Any:
    """Tuples as lists, and nothing for what is empty: what YAML holds."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items() if part is not None}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"width": "magic"}, "width"),
        ({"copies": "zero"}, "copies"),
        ({"noise": "white"}, "noise"),
        ({"upcycle": "clone"}, "upcycle"),
        ({"depth": "fold"}, "depth"),
    ],
)
def test_words_that_are_no_method_are_refused(
    fields: dict, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"growth": {"stages": [{"target": {"dim": 96}, "at_step": 1, **fields}]}}))
    with pytest.raises(SystemExit):
        read_recipe(path)
    assert f"growmoe: {words}: Expected a" in capsys.readouterr().err

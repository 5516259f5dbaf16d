"""Deepening: which layer comes from which, what is exact, and what learns first."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.config import ModelConfig
from modules.errors import InputError
from modules.growth.depth import Deepen
from modules.growth.operation import TensorSource
from modules.growth.roles import role_of
from modules.growth.stage import GrowthTarget
from modules.growth.transition import build_transition, grown_state, materialize, network_source, target_config
from modules.layers.transformer import Transformer
from modules.moe_config import MoEConfig
from modules.optim import OptimizerConfig, build_optimizer
from tests.unit.growth_helpers import (
    ROUTED,
    config_of,
    drift,
    gradients_of,
    grow,
    make,
    model_shapes,
    stage,
    state_of,
    train_step,
    transition_of,
)


def origins(before: int, after: int, *options: Any) -> list[int]:
    nothing: Any = None
    source = TensorSource(ModelConfig(20, dim=16, num_layers=before, num_heads=2), nothing, nothing, nothing)
    return Deepen(source, after, *options).origins


def test_which_layer_a_layer_comes_from() -> None:
    assert origins(3, 6) == origins(3, 6, "interpolate") == [0, 0, 1, 1, 2, 2]
    assert origins(3, 7, "stack") == [0, 1, 2, 0, 1, 2, 0]
    forty = origins(32, 40, "interpolate")  # AquilaMoE, 7B to 16B: every fourth layer twice
    assert [layer for layer in range(1, 40) if forty[layer] == forty[layer - 1]] == [1, 6, 11, 16, 21, 26, 31, 36]
    assert origins(3, 6, "zero_block", (0, 4, 5)) == [0, 0, 1, 2, 2, 2]


@given(st.integers(1, 20), st.integers(0, 40), st.sampled_from(["zero_block", "stack", "interpolate"]))
def test_every_layer_is_used(before: int, more: int, method: Any) -> None:
    """The longest and the shortest series of copies differ by one; but for stack, copies stand together."""
    found = origins(before, before + more, method)
    counts = [found.count(layer) for layer in range(before)]
    assert sum(counts) == before + more and max(counts) - min(counts) <= 1
    assert method == "stack" or found == sorted(found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("stack", (1,)), "only zero_block has it"),
        (("zero_block", (1,)), "must name 2 different layers of 0..4"),
        (("zero_block", (1, 5)), "must name 2 different layers"),
    ],
)
def test_wrong_places_for_new_layers_are_refused(options: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        origins(3, 5, *options)


@settings(max_examples=40)
@given(st.fixed_dictionaries(model_shapes), st.integers(1, 3), st.data())
def test_zero_blocks_change_no_bit_anywhere(shape: dict, more: int, data: Any) -> None:
    torch.manual_seed(shape["seed"])
    old = make(config_of(shape))
    depth = shape["layers"] + more
    places = st.none() | st.permutations(range(depth)).map(lambda order: tuple(order[:more]))
    to = stage(GrowthTarget(num_layers=depth), new_layers=data.draw(places))
    transition = transition_of(old, to)
    assert transition.is_exact and drift(old, materialize(transition.grown, "cpu")) == 0.0


@pytest.mark.parametrize("new_layers", [None, (0, 3)])
@pytest.mark.parametrize("moe", [None, MoEConfig(3, 2, every=2)])
def test_zero_blocks_stand_anywhere(new_layers: Any, moe: MoEConfig | None) -> None:
    torch.manual_seed(0)
    old = make(ModelConfig(vocab_size=20, dim=16, num_layers=3, num_heads=2, moe=moe))
    new = grow(old, stage(GrowthTarget(num_layers=5), new_layers=new_layers))
    assert drift(old, new) == 0.0


@pytest.mark.parametrize("method", ["stack", "interpolate"])
@pytest.mark.parametrize("moe", [None, MoEConfig(4, 2, every=2)])
def test_stacked_blocks_carry_weights_and_state(method: Any, moe: MoEConfig | None) -> None:
    torch.manual_seed(0)
    old = make(ModelConfig(vocab_size=20, dim=16, num_layers=2, num_heads=2, moe=moe))
    optimizer = build_optimizer(old, OptimizerConfig(), {})
    train_step(old, optimizer, torch.randint(20, (2, 9)))
    state = state_of(old, optimizer)
    transition = build_transition(network_source(old, state, {}), stage(GrowthTarget(num_layers=4), depth=method))
    assert not transition.is_exact and transition.methods == [method]
    new = materialize(transition.grown, "cpu")
    carried, weights = grown_state(transition.grown, new), old.state_dict()
    for name, weight in new.state_dict().items():
        role = role_of(name)
        layer = None if role.layer is None else (role.layer % 2 if method == "stack" else role.layer // 2)
        origin = name if layer is None else role.at_layer(layer)
        assert torch.equal(weight, weights[origin])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(carried[name][key], state[origin][key])
    assert drift(old, new) > 1e-3


@pytest.mark.parametrize("routed", ["none", "shared"])
def test_zero_blocks_learn_through_their_output_first(routed: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=20, dim=16, num_layers=2, num_heads=2, o_bias=True, moe=ROUTED[routed])
    new = grow(make(config), stage(GrowthTarget(num_layers=3)))
    for name, slope in gradients_of(new, torch.randint(20, (2, 9))).items():
        if name.startswith("blocks.1."):
            assert (slope.abs().max().item() > 0) == role_of(name).writes_residual, name


@pytest.mark.parametrize("structure", ["hybridnorm", "postnorm"])
def test_new_blocks_with_a_norm_behind_them_are_closed_by_its_gains(structure: Any) -> None:
    torch.manual_seed(0)
    old = make(ModelConfig(vocab_size=20, dim=16, num_layers=2, num_heads=2, norm_structure=structure))
    new = grow(old, stage(GrowthTarget(num_layers=3)))
    block = new.blocks[1]
    for gain, writer in (
        (block.attention_post_norm.weight, block.attention.o_proj.weight),
        (block.feed_forward_post_norm.weight, block.feed_forward.down.weight),
    ):
        assert gain.abs().max() == 0 and writer.abs().max() > 0
    for name, slope in gradients_of(new, torch.randint(20, (2, 9))).items():
        if name.startswith("blocks.1."):
            assert (slope.abs().max().item() > 0) == ("post_norm" in name), name


def test_a_deepened_mixture_keeps_the_kind_of_each_layer() -> None:
    routed = ModelConfig(20, dim=48, num_layers=4, num_heads=3, moe=MoEConfig(4, 2, every=2))
    for method, layers in (("zero_block", (2, 3, 6, 7)), ("interpolate", (2, 3, 6, 7)), ("stack", (1, 3, 5, 7))):
        assert target_config(routed, stage(GrowthTarget(num_layers=8), depth=method)).routed_layers == layers


def test_a_deepened_mixture_has_the_experts_and_routers_of_its_originals() -> None:
    torch.manual_seed(0)
    config = ModelConfig(20, dim=16, num_layers=3, num_heads=2, moe=MoEConfig(3, 2, layers=(1,), num_shared_experts=1))
    old = make(config)
    transition = transition_of(old, stage(GrowthTarget(num_layers=6), depth="interpolate"))
    new = materialize(transition.grown, "cpu")
    assert new.config.routed_layers == (2, 3) and isinstance(new, Transformer)
    for name, weight in old.blocks[1].feed_forward.state_dict().items():
        for layer in (2, 3):
            assert torch.equal(new.blocks[layer].feed_forward.state_dict()[name], weight)

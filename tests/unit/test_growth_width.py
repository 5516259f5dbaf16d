"""Widening: exact for any ratio where it says so, equal to the reference where it is not."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from modules.config import ModelConfig
from modules.growth.maps import AxisMap, MapRules, widened_eps
from modules.growth.roles import Axis
from modules.growth.stage import GrowthTarget
from modules.growth.transition import materialize
from modules.layers.transformer import Transformer
from tests.unit.growth_helpers import (
    EXACT,
    ROUTED,
    config_of,
    drift,
    grow,
    grows,
    logits,
    make,
    model_shapes,
    more_width,
    stage,
    target_of,
    transition_of,
)

FPI_CASE: dict[str, Any] = {
    "dim": 8,
    "kv": 2,
    "group": 1,
    "ffn": 8,
    "layers": 2,
    "tied": True,
    "bias": True,
    "norm": "projection",
    "moe": "none",
    "structure": "postnorm",
    "seed": 0,
    "more_dim": 8,
    "more_kv": 2,
    "more_group": 1,
    "more_ffn": 8,
    "repeats": 1,
}


@settings(max_examples=100)
@given(
    st.fixed_dictionaries(model_shapes | more_width),
    st.sampled_from(["iso", "iso", "zero", "lemon"]),
    st.sampled_from(["even", "random", "powers"]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from(["projection", "pairs"]),
)
def test_iso_zero_and_lemon_are_exact_for_any_shape(
    shape: dict, width: Any, copies: Any, split: float, noise: Any
) -> None:
    assume(grows(shape))
    torch.manual_seed(shape["seed"])
    old, target = make(config_of(shape)), target_of(shape)
    transition = transition_of(
        old, stage(target, width=width, copies=copies, split_noise=split, noise=noise, seed=shape["seed"])
    )
    new = materialize(transition.grown, "cpu")
    assert transition.is_exact and drift(old, new) < EXACT
    assert (new.config.dim, new.config.num_heads, new.config.kv_heads) == (
        target.dim,
        target.num_heads,
        target.num_kv_heads,
    )
    assert new.config.head_size == 4 and new.config.ffn_size == target.ffn_dim


AXES: dict[str, dict[str, int]] = {
    "dim": {"dim": 40},
    "ffn": {"ffn_dim": 56},
    "shared and routed experts": {"ffn_dim": 40},
    "heads in their groups": {"num_heads": 10},
    "whole groups": {"num_heads": 12, "num_kv_heads": 6},
    "more groups, by a ratio": {"num_heads": 6, "num_kv_heads": 3},
    "GQA to MHA": {"num_kv_heads": 4},
    "all": {"dim": 40, "ffn_dim": 56, "num_heads": 9, "num_kv_heads": 3},
}


@pytest.mark.parametrize(("routed", "tied"), [("none", True), ("shared", False)])
@pytest.mark.parametrize(
    ("width", "copies"),
    [("iso", "even"), ("iso", "random"), ("iso", "powers"), ("zero", "even"), ("lemon", "even"), ("fpi", "even")],
)
@pytest.mark.parametrize("axis", AXES)
def test_each_axis_alone(axis: str, width: Any, copies: Any, routed: str, tied: bool) -> None:
    torch.manual_seed(0)
    old = make(
        ModelConfig(
            20,
            dim=16,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            ffn_dim=24,
            qkv_bias=True,
            tie_embeddings=tied,
            moe=ROUTED[routed],
        )
    )
    transition = transition_of(old, stage(GrowthTarget(**AXES[axis]), width=width, copies=copies))
    exact = width != "fpi" or "dim" not in AXES[axis]
    assert transition.is_exact == exact == (drift(old, materialize(transition.grown, "cpu")) < EXACT)


@pytest.mark.parametrize("structure", ["prenorm", "hybridnorm", "postnorm"])
@pytest.mark.parametrize("norm", [None, "head", "projection"])
@pytest.mark.parametrize(
    ("width", "copies"), [("iso", "random"), ("iso", "powers"), ("zero", "even"), ("lemon", "even")]
)
def test_all_axes_of_each_kind_of_model(width: Any, copies: Any, norm: Any, structure: Any) -> None:
    """Five query heads in a group of two, and 46 channels, leave powers something to fill up."""
    torch.manual_seed(0)
    shape = {"dim": 24, "kv": 2, "group": 2, "ffn": 24, "layers": 2, "tied": True, "bias": True, "moe": "none"}
    old = make(config_of(shape | {"norm": norm, "structure": structure}))
    transition = transition_of(old, stage(GrowthTarget(46, None, 15, 3, 40), width=width, copies=copies))
    assert transition.is_exact and drift(old, materialize(transition.grown, "cpu")) < EXACT


@settings(max_examples=100)
@example(FPI_CASE | {"more_group": 0, "more_kv": 2}, "fpi", "even", "all", "self")  # projections of whole ratios
@example(FPI_CASE | {"more_dim": 24}, "fpi", "powers", "all", "self")  # four copies of everything
@example(FPI_CASE | {"more_dim": 24, "norm": None, "structure": "hybridnorm"}, "fpi", "even", "all", "self")
@example(FPI_CASE | {"more_kv": 0, "more_group": 0, "layers": 1}, "aki", "even", "all", "self")  # no next layer
@example(
    FPI_CASE | {"more_kv": 0, "more_group": 0, "more_ffn": 0}, "aki", "even", "ffn_heads", "next"
)  # nothing of the scope grows
@given(
    st.fixed_dictionaries(model_shapes | more_width | {"more_dim": st.sampled_from([0, 8, 16, 24])}),
    st.sampled_from(["iso", "fpi", "fpi", "aki"]),
    st.sampled_from(["even", "random", "powers"]),
    st.sampled_from(["all", "ffn_heads"]),
    st.sampled_from(["self", "next"]),
)
def test_a_transition_knows_whether_it_is_exact(
    shape: dict, width: Any, copies: Any, scope: Any, consumers: Any
) -> None:
    assume(grows(shape))
    torch.manual_seed(shape["seed"])
    old = make(config_of(shape))
    to = stage(target_of(shape), width=width, copies=copies, aki_scope=scope, aki_consumers=consumers)
    transition = transition_of(old, to)
    change = drift(old, materialize(transition.grown, "cpu"))
    assert change < EXACT if transition.is_exact else change > 1e-6


@settings(max_examples=50)
@given(st.sampled_from([2, 3]), st.fixed_dictionaries(model_shapes), st.booleans())
def test_fpi_is_exact_for_whole_ratios(times: int, shape: dict, all_axes: bool) -> None:
    torch.manual_seed(shape["seed"])
    old = make(config_of(shape))
    wider = GrowthTarget(dim=times * old.config.dim)
    if all_axes:
        heads, kv, ffn = (times * size for size in (old.config.num_heads, old.config.kv_heads, old.config.ffn_size))
        wider = dataclasses.replace(wider, num_heads=heads, num_kv_heads=kv, ffn_dim=ffn)
    transition = transition_of(old, stage(wider, width="fpi"))
    assert transition.is_exact and drift(old, materialize(transition.grown, "cpu")) < EXACT


def test_the_tiled_order_of_heads_is_not_exact() -> None:
    """The published mistake: new query heads tiled over the whole list leave their key-value group."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=20, dim=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4)
    old = make(config)
    new = grow(old, stage(GrowthTarget(num_heads=8)))
    assert drift(old, new) < EXACT
    tiled = (torch.arange(8) % 4)[:, None] * 4 + torch.arange(4)
    layer, source = new.blocks[0].attention, old.blocks[0].attention
    with torch.no_grad():
        layer.q_proj.weight.copy_(source.q_proj.weight[tiled.flatten()])
        layer.o_proj.weight.copy_(source.o_proj.weight[:, tiled.flatten()] / 2)
    assert drift(old, new) > 0.01


def test_a_bias_that_is_shared_out_is_not_exact() -> None:
    """A planted fault: biases are copied, and never divided by the number of copies."""
    torch.manual_seed(0)
    old = make(ModelConfig(20, dim=16, num_layers=1, num_heads=2, qkv_bias=True))
    new = grow(old, stage(GrowthTarget(num_heads=4, num_kv_heads=4)))
    assert drift(old, new) < EXACT
    with torch.no_grad():
        new.blocks[0].attention.v_proj.bias.div_(2)
    assert drift(old, new) > 1e-3


def rms_before_norms(network: Transformer) -> list[Tensor]:
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda m, x, y: seen.append(x[0].square().mean(-1).sqrt()))
        for name, module in network.named_modules()
        if name.endswith(("attention_norm", "feed_forward_norm", "final_norm"))
    ]
    logits(network, torch.arange(7)[None])
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("structure", ["prenorm", "hybridnorm"])
@pytest.mark.parametrize(
    ("width", "copies", "dim"), [("iso", "even", 40), ("iso", "random", 40), ("lemon", "even", 40), ("fpi", "even", 48)]
)
def test_what_norms_see_keeps_its_size(width: Any, copies: Any, dim: int, structure: Any) -> None:
    torch.manual_seed(0)
    old = make(ModelConfig(vocab_size=20, dim=24, num_layers=2, num_heads=3, norm_structure=structure))
    new = grow(old, stage(GrowthTarget(dim=dim, num_heads=5), width=width, copies=copies))
    before, after = rms_before_norms(old), rms_before_norms(new)
    assert len(before) == len(after) == 5 and new.config.norm_eps == old.config.norm_eps
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=0)


@pytest.mark.parametrize(("width", "copies"), [("zero", "even"), ("iso", "powers")])
@pytest.mark.parametrize(("qk_norm", "falls"), [(False, True), (True, False)])
def test_where_the_stream_becomes_smaller_eps_does_too(width: Any, copies: Any, qk_norm: bool, falls: bool) -> None:
    torch.manual_seed(0)
    old = make(ModelConfig(vocab_size=20, dim=24, num_layers=2, num_heads=3, qk_norm=qk_norm, norm_eps=1e-2))
    new = grow(old, stage(GrowthTarget(dim=46), width=width, copies=copies))
    factor = 24 / 46 if falls else 1.0
    assert new.config.norm_eps == pytest.approx(1e-2 * factor, rel=1e-15)
    for one, other in zip(rms_before_norms(old), rms_before_norms(new), strict=True):
        torch.testing.assert_close(one * factor**0.5, other, rtol=EXACT, atol=0)
    forgotten = materialize(transition_of(old, stage(GrowthTarget(dim=46), width=width, copies=copies)).grown, "cpu")
    for module in forgotten.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.eps = 1e-2 * (1.0 if falls else 24 / 46)
    assert drift(old, new) < EXACT < 1e-6 < drift(old, forgotten)


@given(st.integers(1, 200), st.integers(0, 200))
def test_eps_stays_to_the_last_bit(dim: int, more: int) -> None:
    """dim2 / dim · dim / dim2 is not always 1."""
    config = ModelConfig(20, dim=dim, num_heads=1, head_dim=2)
    assert widened_eps(config, dim + more, MapRules("even")) == config.norm_eps


@pytest.mark.parametrize("tied", [False, True])
def test_copies_in_powers_lose_nothing_in_bfloat16(tied: bool) -> None:
    """Weights, rounded after growing, with gains in float32; the ratios are none of powers."""
    torch.manual_seed(0)
    config = ModelConfig(20, dim=32, num_layers=3, num_heads=4, num_kv_heads=2, ffn_dim=32, tie_embeddings=tied)
    old = make(config)
    changes = {}
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.copy_(parameter.bfloat16())
        for copies in ("even", "powers"):
            new = grow(old, stage(GrowthTarget(dim=46, num_heads=14, ffn_dim=88), copies=copies))
            for parameter in new.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(parameter.bfloat16())
            changes[copies] = drift(old, new)
    assert changes["powers"] < EXACT < 1e-3 < changes["even"]


@pytest.mark.parametrize(("width", "copies"), [("iso", "powers"), ("fpi", "powers"), ("zero", "even")])
def test_what_only_fills_the_size_up_is_not_written(width: Any, copies: Any) -> None:
    """Its readers are drawn: were it written, they would add noise."""
    torch.manual_seed(0)
    old = make(ModelConfig(20, dim=24, num_layers=1, num_heads=2))
    transition = transition_of(old, stage(GrowthTarget(dim=46), width=width, copies=copies))
    new = materialize(transition.grown, "cpu")
    live = transition.grown.maps[Axis.RESIDUAL_OUT].live == 1  # type: ignore[attr-defined]
    assert not live.all()
    block = new.blocks[0]
    for weight in (new.embedding.weight.T, block.attention.o_proj.weight, block.feed_forward.down.weight):
        assert torch.equal(weight.abs().amax(1) > 0, live)
    assert (block.attention.q_proj.weight.abs().amin(0) > 0).all()


@given(st.integers(1, 40), st.integers(0, 400), st.sampled_from([2, 4]))
def test_copies_come_in_powers(source: int, more: int, base: int) -> None:
    copies = MapRules("powers").copies("some", source, source + more, base)
    assert copies.index[:source].tolist() == list(range(source)) and len(copies.index) == source + more
    counts = torch.bincount(copies.index, weights=copies.live).long().tolist()
    assert set(counts) <= {base**n for n in range(10)} and max(counts) <= base * min(counts)
    assert (copies.live == 0).sum() < min(counts) * (base - 1)  # no room for one more power


@given(
    st.integers(1, 40), st.integers(0, 100), st.sampled_from(["even", "random", "powers", "zero"]), st.integers(0, 9)
)
def test_indices_of_a_map(source: int, more: int, kind: Any, seed: int) -> None:
    """Old indices come first and stay; pairs are copies of one source, and signs cancel for each."""
    copies = MapRules(kind, seed=seed).copies("some", source, source + more)
    ones = torch.ones(source + more)
    axis_map = AxisMap(copies.index, ones, ones, copies.live)
    assert axis_map.num_source == source and axis_map.new.tolist() == list(range(source, source + more))
    first, sign = axis_map.pairs
    assert torch.equal(copies.index[first], copies.index) and set(sign.tolist()) <= {-1.0, 0.0, 1.0}
    assert (sign[copies.live == 0] == 0).all()
    assert torch.zeros(source, dtype=torch.float64).index_add_(0, copies.index, sign).abs().max() == 0
    unpaired = torch.bincount(copies.index[(sign == 0) & (copies.live == 1)], minlength=source)
    assert unpaired.max() <= 1


# Against the reference

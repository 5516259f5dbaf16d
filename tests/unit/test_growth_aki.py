"""FPI, AKI and AKI-Pro against their reference, row by row."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from modules.config import ModelConfig
from modules.growth.stage import GrowthTarget
from modules.growth.transition import materialize
from modules.layers.transformer import Transformer
from modules.moe_config import MoEConfig
from tests.reference import growth as reference
from tests.unit.growth_helpers import (
    EXACT,
    drift,
    grow,
    make,
    stage,
    transition_of,
)

FAITHFUL = st.fixed_dictionaries(
    {
        "dims": st.sampled_from([(8, 16), (8, 24), (16, 24), (16, 40), (8, 8)]),
        "heads": st.sampled_from([(2, 1, 3), (4, 2, 6), (4, 2, 10), (3, 3, 3), (4, 2, 4)]),
        "ffn": st.sampled_from([(8, 8), (8, 16), (16, 24)]),
        "tied": st.booleans(),
        "bias": st.booleans(),
        "moe": st.sampled_from([None, MoEConfig(2, 1), MoEConfig(2, 1, every=2)]),
        "seed": st.integers(0, 20),
    }
)


def faithful_models(shape: dict) -> tuple[Transformer, GrowthTarget]:
    torch.manual_seed(shape["seed"])
    (dim, wider_dim), (heads, kv, more_heads), (ffn, more_ffn) = shape["dims"], shape["heads"], shape["ffn"]
    config = ModelConfig(
        20, dim, num_layers=3, num_heads=heads, num_kv_heads=kv, head_dim=2, ffn_dim=ffn,
        tie_embeddings=shape["tied"], qkv_bias=shape["bias"], o_bias=shape["bias"], moe=shape["moe"],
    )  # fmt: skip
    assume((dim, heads, ffn) != (wider_dim, more_heads, more_ffn))
    return make(config), GrowthTarget(dim=wider_dim, num_heads=more_heads, ffn_dim=more_ffn)


def assert_same(new: Transformer, want: dict[str, Tensor]) -> None:
    assert set(new.state_dict()) == set(want)
    for name, weight in new.state_dict().items():
        torch.testing.assert_close(weight, want[name], rtol=1e-14, atol=0, msg=lambda text, n=name: f"{n}: {text}")


@settings(max_examples=25)
@given(FAITHFUL)
def test_fpi_is_the_reference(shape: dict) -> None:
    old, target = faithful_models(shape)
    new = grow(old, stage(target, width="fpi"))
    assert_same(new, reference.fpi(old.state_dict(), old.config, new.config))


@settings(max_examples=40)
@given(FAITHFUL, st.sampled_from(["all", "ffn_heads"]), st.sampled_from(["self", "next"]))
def test_aki_is_the_reference(shape: dict, scope: Any, consumers: Any) -> None:
    old, target = faithful_models(shape)
    new = grow(old, stage(target, width="aki", aki_scope=scope, aki_consumers=consumers))
    assert_same(new, reference.aki(old.state_dict(), old.config, new.config, scope, consumers))


def test_aki_pro_is_the_reference() -> None:
    torch.manual_seed(0)
    old = make(ModelConfig(20, dim=16, num_layers=3, num_heads=4, num_kv_heads=2, ffn_dim=24, qkv_bias=True))
    target = GrowthTarget(dim=20, num_layers=5, num_heads=6, ffn_dim=40)
    transition = transition_of(old, stage(target, width="aki", depth="interpolate"))
    assert not transition.is_exact and transition.methods == ["aki", "interpolate"]
    new = materialize(transition.grown, "cpu")
    assert_same(new, reference.aki_pro(old.state_dict(), old.config, new.config))


@pytest.mark.parametrize("tied", [False, True])
def test_fpi_at_other_ratios_changes_the_function_and_iso_does_not(tied: bool) -> None:
    """AquilaMoE's 4096 to 5120 is such a ratio."""
    torch.manual_seed(0)
    old = make(ModelConfig(20, dim=32, num_layers=3, num_heads=4, head_dim=8, tie_embeddings=tied))
    changes = {}
    for width in ("fpi", "iso"):
        transition = transition_of(old, stage(GrowthTarget(dim=40, num_heads=5), width=width))
        changes[width] = drift(old, materialize(transition.grown, "cpu"))
        assert transition.is_exact == (width == "iso")
    assert changes["iso"] < EXACT < 1e-3 < changes["fpi"]


# AKI


def grown_pair(config: ModelConfig, target: GrowthTarget, **options: Any) -> tuple[Transformer, Transformer]:
    """The same model grown by AKI and by FPI."""
    torch.manual_seed(0)
    old = make(config)
    return grow(old, stage(target, width="aki", **options)), grow(old, stage(target, width="fpi"))


GROUPED = ModelConfig(20, dim=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, ffn_dim=24, qkv_bias=True)
WIDER = GrowthTarget(dim=20, num_heads=10, ffn_dim=40)
NEW_ROWS = {
    "attention.q_proj": [head * 4 + c for head in (2, 3, 4, 7, 8, 9) for c in range(4)],  # behind those of each group
    "attention.k_proj": [],
    "attention.v_proj": [],
    "attention.o_proj": [16, 17, 18, 19],
    "feed_forward.gate": list(range(24, 40)),
    "feed_forward.up": list(range(24, 40)),
    "feed_forward.down": [16, 17, 18, 19],
}


@pytest.mark.parametrize("scope", ["all", "ffn_heads"])
@pytest.mark.parametrize("part", NEW_ROWS)
def test_aki_takes_new_rows_from_the_next_layer_bit_for_bit(part: str, scope: Any) -> None:
    aki, fpi = grown_pair(GROUPED, WIDER, aki_scope=scope)
    left_alone = scope == "ffn_heads" and part.endswith(("o_proj", "down"))
    for layer in range(3):
        for kind in ("weight", "bias") if part.endswith(("q_proj", "k_proj", "v_proj")) else ("weight",):
            got, own = (net.get_parameter(f"blocks.{layer}.{part}.{kind}") for net in (aki, fpi))
            following = fpi.get_parameter(f"blocks.{min(layer + 1, 2)}.{part}.{kind}")
            new = [] if left_alone else NEW_ROWS[part]
            old = [row for row in range(len(got)) if row not in new]
            assert torch.equal(got[old], own[old]) and torch.equal(got[new], following[new])
            assert not new or layer == 2 or not torch.equal(got[new], own[new])


def test_aki_leaves_the_last_layer_and_what_is_outside_the_blocks_to_fpi() -> None:
    aki, fpi = (network.state_dict() for network in grown_pair(GROUPED, WIDER))
    for name, weight in aki.items():
        assert torch.equal(weight, fpi[name]) == ("norm" in name or not name.startswith(("blocks.0", "blocks.1")) or
                                                  "k_proj" in name or "v_proj" in name), name  # fmt: skip


def test_aki_of_new_key_value_heads() -> None:
    aki, fpi = grown_pair(GROUPED, GrowthTarget(num_heads=8, num_kv_heads=4))
    for part in ("k_proj", "v_proj"):
        got, own, following = (
            network.get_parameter(f"blocks.{layer}.attention.{part}.weight") for network, layer in
            ((aki, 0), (fpi, 0), (fpi, 1))
        )  # fmt: skip
        assert torch.equal(got[:8], own[:8]) and torch.equal(got[8:], following[8:])


@pytest.mark.parametrize("consumers", ["self", "next"])
def test_who_reads_what_aki_took_from_the_next_layer(consumers: Any) -> None:
    aki, fpi = grown_pair(GROUPED, GrowthTarget(ffn_dim=40), aki_consumers=consumers)
    own, following = (fpi.blocks[layer].feed_forward.down.weight for layer in (0, 1))
    got = aki.blocks[0].feed_forward.down.weight
    assert torch.equal(got[:, :24], own[:, :24])
    assert torch.equal(got[:, 24:], (own if consumers == "self" else following)[:, 24:])


def test_aki_of_routed_layers_takes_from_the_next_routed_layer() -> None:
    config = dataclasses.replace(GROUPED, num_layers=4, moe=MoEConfig(3, 2, every=2, num_shared_experts=1))
    aki, fpi = grown_pair(config, GrowthTarget(ffn_dim=40))
    for part in ("experts.gate", "experts.up"):
        got, own, following = (
            net.get_parameter(f"blocks.{layer}.feed_forward.{part}") for net, layer in ((aki, 1), (fpi, 1), (fpi, 3))
        )
        assert torch.equal(got[..., :24], own[..., :24]) and torch.equal(got[..., 24:], following[..., 24:])
        last = f"blocks.3.feed_forward.{part}"
        assert torch.equal(aki.get_parameter(last), fpi.get_parameter(last))
    shared, following = aki.blocks[1].feed_forward.shared.up.weight, fpi.blocks[3].feed_forward.shared.up.weight
    dense, second = aki.blocks[0].feed_forward.up.weight, fpi.blocks[2].feed_forward.up.weight
    assert torch.equal(shared[24:], following[24:]) and torch.equal(dense[24:], second[24:])


# Noise

"""Growth: what is exact stays exact for any shape, and optimizer state follows."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from modules.config import ModelConfig
from modules.errors import InputError
from modules.functional.losses import linear_cross_entropy
from modules.growth.depth import Deepen
from modules.growth.maps import MapRules
from modules.growth.operation import TensorSource
from modules.growth.roles import role_of
from modules.growth.stage import GrowthStage, GrowthTarget
from modules.growth.transition import (
    apply_stage,
    build_transition,
    grown_factors,
    grown_state,
    materialize,
    network_source,
    target_config,
)
from modules.layers.transformer import Transformer
from modules.moe_config import CapacityConfig, MoEConfig, RouterConfig
from modules.optim import OptimizerConfig, ParameterFactors, build_optimizer
from tests.unit.test_layers import randomize

EXACT = 1e-10


def make(config: ModelConfig, std: float = 0.3) -> Transformer:
    network = randomize(Transformer(config), torch.float64, std)
    for layer in network.routed_layers():
        if layer.router.selection_bias_E is not None:
            layer.router.selection_bias_E.normal_(std=0.1)
    return network


def stage(target: GrowthTarget, **options: object) -> GrowthStage:
    return GrowthStage(target, at_step=1, **options)


def grow(network: Transformer, to: GrowthStage) -> Transformer:
    return materialize(build_transition(network_source(network, {}, {}), to).grown, "cpu")


@torch.no_grad()
def logits(network: Transformer, tokens: Tensor) -> Tensor:
    return network.logits(network(tokens)[0])


def drift(old: Transformer, new: Transformer) -> float:
    tokens = torch.randint(old.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    return (logits(old, tokens) - logits(new, tokens)).abs().max().item()


ROUTED = {
    "none": None,
    "plain": MoEConfig(3, 2),
    "shared": MoEConfig(
        4,
        2,
        num_shared_experts=2,
        shared_gate=True,
        router=RouterConfig(score="sigmoid", bias_update_rate=0.01, gate_scale=2.5),
    ),
}

shapes = st.fixed_dictionaries(
    {
        "dim": st.integers(1, 6).map(lambda n: 8 * n),
        "kv": st.integers(1, 3),
        "group": st.integers(1, 3),
        "ffn": st.integers(1, 5).map(lambda n: 8 * n),
        "layers": st.integers(1, 3),
        "more_dim": st.integers(0, 5).map(lambda n: 8 * n),
        "more_kv": st.integers(0, 3),
        "more_group": st.integers(0, 2),
        "more_ffn": st.integers(0, 5).map(lambda n: 8 * n),
        "more_layers": st.integers(0, 3),
        "tied": st.booleans(),
        "bias": st.booleans(),
        "norm": st.sampled_from([None, "head", "projection"]),
        "moe": st.sampled_from(["none", "plain", "shared"]),
        "structure": st.sampled_from(["prenorm", "hybridnorm", "postnorm"]),
        "noise": st.sampled_from([0.0, 0.3]),
        "copies": st.sampled_from(["even", "powers"]),
        "seed": st.integers(0, 50),
    }
)


def small_and_target(shape: dict) -> tuple[ModelConfig, GrowthTarget]:
    config = ModelConfig(
        vocab_size=20,
        dim=shape["dim"],
        num_layers=shape["layers"],
        num_heads=shape["kv"] * shape["group"],
        num_kv_heads=shape["kv"],
        head_dim=4,
        ffn_dim=shape["ffn"],
        tie_embeddings=shape["tied"],
        qkv_bias=shape["bias"],
        o_bias=shape["bias"],
        qk_norm=shape["norm"] is not None,
        qk_norm_scope=shape["norm"] or "head",
        norm_structure=shape["structure"],
        moe=ROUTED[shape["moe"]],
    )
    kv, group = shape["kv"] + shape["more_kv"], shape["group"] + shape["more_group"]
    target = GrowthTarget(
        dim=shape["dim"] + shape["more_dim"],
        num_heads=kv * group,
        num_kv_heads=kv,
        ffn_dim=shape["ffn"] + shape["more_ffn"],
        num_layers=shape["layers"] + shape["more_layers"],
    )
    return config, target


@given(shapes)
def test_widening_and_deepening_are_exact_for_any_shape(shape: dict) -> None:
    torch.manual_seed(shape["seed"])
    config, target = small_and_target(shape)
    assume(any(value for name, value in shape.items() if name.startswith("more")))
    old = make(config)
    new = grow(old, stage(target, split_noise=shape["noise"], copies=shape["copies"]))
    largest = logits(old, torch.arange(9)[None]).abs().max().item()
    assert drift(old, new) < EXACT * max(1.0, largest)
    assert new.config.dim == target.dim and new.config.num_layers == target.num_layers


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


@given(st.integers(1, 40), st.integers(0, 400), st.sampled_from([2, 4]))
def test_copies_come_in_powers(source: int, more: int, base: int) -> None:
    copies = MapRules("powers").copies("some", source, source + more, base)
    assert copies.index[:source].tolist() == list(range(source)) and len(copies.index) == source + more
    counts = torch.bincount(copies.index, weights=copies.live).long().tolist()
    assert set(counts) <= {base**n for n in range(10)} and max(counts) <= base * min(counts)
    assert (copies.live == 0).sum() < min(counts) * (base - 1)  # no room for one more power


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


def test_pre_norm_rms_is_unchanged() -> None:
    torch.manual_seed(0)
    old = make(ModelConfig(vocab_size=20, dim=24, num_layers=2, num_heads=3))
    new = grow(old, stage(GrowthTarget(dim=40, num_heads=5)))
    seen: dict[str, list[Tensor]] = {"old": [], "new": []}
    for name, network in (("old", old), ("new", new)):
        for module in network.modules():
            if isinstance(module, torch.nn.RMSNorm):
                module.register_forward_hook(lambda m, x, y, n=name: seen[n].append(x[0].square().mean(-1).sqrt()))
    tokens = torch.randint(20, (1, 7))
    logits(old, tokens), logits(new, tokens)
    assert len(seen["old"]) == 5
    for before, after in zip(seen["old"], seen["new"], strict=True):
        torch.testing.assert_close(before, after, rtol=1e-10, atol=0)


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


@pytest.mark.parametrize("new_layers", [None, (0, 3)])
@pytest.mark.parametrize("moe", [None, MoEConfig(3, 2, every=2)])
def test_zero_blocks_stand_anywhere(new_layers: Any, moe: MoEConfig | None) -> None:
    torch.manual_seed(0)
    old = make(ModelConfig(vocab_size=20, dim=16, num_layers=3, num_heads=2, moe=moe))
    new = grow(old, stage(GrowthTarget(num_layers=5), new_layers=new_layers))
    assert drift(old, new) == 0.0


@pytest.mark.parametrize("method", ["stack", "interpolate"])
def test_stacked_blocks_carry_weights_and_state(method: Any) -> None:
    torch.manual_seed(0)
    old = make(ModelConfig(vocab_size=20, dim=16, num_layers=2, num_heads=2))
    optimizer = build_optimizer(old, OptimizerConfig(), {})
    train_step(old, optimizer, torch.randint(20, (2, 9)))
    state = {name: optimizer.state[p] for name, p in old.named_parameters()}
    transition = build_transition(network_source(old, state, {}), stage(GrowthTarget(num_layers=4), depth=method))
    assert not transition.is_exact and transition.methods == [method]
    new = materialize(transition.grown, "cpu")
    carried, weights = grown_state(transition.grown, new), old.state_dict()
    for name, weight in new.state_dict().items():
        role = role_of(name)
        layer = None if role.layer is None else (role.layer % 2 if method == "stack" else role.layer // 2)
        origin = name if layer is None else role.at_layer(layer)
        assert torch.equal(weight, weights[origin])
        assert torch.equal(carried[name]["exp_avg"], state[origin]["exp_avg"])
    assert drift(old, new) > 1e-3


def test_zero_blocks_change_no_bit_and_learn_through_their_output_first() -> None:
    torch.manual_seed(0)
    old = make(ModelConfig(vocab_size=20, dim=16, num_layers=2, num_heads=2))
    new = grow(old, stage(GrowthTarget(num_layers=3)))
    assert drift(old, new) == 0.0
    new(torch.randint(20, (1, 6)))[0].square().sum().backward()
    for name, parameter in new.named_parameters():
        if name.startswith("blocks.1."):
            moved = parameter.grad is not None and parameter.grad.abs().max().item() > 0
            assert moved == role_of(name).writes_residual, name


@pytest.mark.parametrize("renormalize", [True, False])
def test_upcycling_by_copies(renormalize: bool) -> None:
    torch.manual_seed(0)
    old = make(ModelConfig(vocab_size=20, dim=16, num_layers=4, num_heads=2))
    moe = MoEConfig(4, 2, every=2, renormalize=renormalize)
    new = grow(old, stage(GrowthTarget(moe=moe), upcycle="copy", router_std=1.0))
    assert new.config.routed_layers == (1, 3)
    assert (drift(old, new) < EXACT) == renormalize


def test_drop_upcycling_redraws_one_set_of_neurons_in_all_three_matrices() -> None:
    torch.manual_seed(0)
    old = make(ModelConfig(vocab_size=20, dim=16, num_layers=1, num_heads=2, ffn_dim=40))
    new = grow(old, stage(GrowthTarget(moe=MoEConfig(4, 2)), upcycle="drop", drop_ratio=0.25))
    dense, experts = old.blocks[0].feed_forward, new.blocks[0].feed_forward.experts
    sets = []
    for e in range(4):
        changed = [
            (experts.gate[e] != dense.gate.weight.T).any(0),
            (experts.up[e] != dense.up.weight.T).any(0),
            (experts.down[e] != dense.down.weight.T).any(1),
        ]
        assert changed[0].sum() == 10
        assert torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])
        sets.append(tuple(changed[0].nonzero().flatten().tolist()))
    assert len(set(sets)) == 4


def train_step(network: Transformer, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    hidden, _ = network(tokens[:, :-1])
    total, _ = linear_cross_entropy(hidden.flatten(0, 1), network.head_weight, tokens[:, 1:].flatten())
    optimizer.zero_grad()
    (total / tokens[:, 1:].numel()).backward()
    optimizer.step()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kv", "norms", "routed"),
    [(1, "prenorm", "none"), (4, "prenorm", "none"), (4, "hybridnorm", "shared"), (1, "postnorm", "plain")],
)
@pytest.mark.parametrize("copies", ["even", "powers"])
def test_mapped_state_follows_the_small_model_for_ten_steps(
    tied: bool, copies: Any, kv: int, norms: Any, routed: str
) -> None:
    """Integer ratios in every width: the grown model's Adam path is the small model's."""
    torch.manual_seed(0)
    config = ModelConfig(
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
    settings = OptimizerConfig(lr=1e-2, weight_decay=0.1, eps=1e-3)
    small = make(config)
    small_optimizer = build_optimizer(small, settings, {})
    batches = torch.randint(20, (15, 2, 9))
    for tokens in batches[:5]:
        train_step(small, small_optimizer, tokens)
    state = {name: copy.deepcopy(small_optimizer.state[p]) for name, p in small.named_parameters()}  # both train on
    wider = GrowthTarget(
        dim=64, num_heads=8, num_kv_heads=kv if kv == 1 else 8, ffn_dim=48 if copies == "powers" else 72
    )
    to = stage(wider, copies=copies)
    chain = build_transition(network_source(small, state, {}), to).grown
    large = materialize(chain, "cpu")
    optimizer = build_optimizer(large, settings, grown_factors(chain, large))
    carried = grown_state(chain, large)
    for name, parameter in large.named_parameters():
        optimizer.state[parameter] = carried[name]
    for tokens in batches[5:]:
        train_step(small, small_optimizer, tokens)
        train_step(large, optimizer, tokens)
        assert drift(small, large) < 1e-9
    fresh = build_optimizer(large, settings, {})
    train_step(small, small_optimizer, batches[0])
    train_step(large, fresh, batches[0])
    assert drift(small, large) > 1e-4  # without the factors it leaves the path: the test can fail


def test_copies_part_only_with_noise() -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=20, dim=16, num_layers=1, num_heads=2, ffn_dim=24)
    for noise, apart in ((0.0, False), (0.2, True)):
        old = make(config)
        to = stage(GrowthTarget(ffn_dim=48), split_noise=noise)
        chain = build_transition(network_source(old, {}, {}), to).grown
        new = materialize(chain, "cpu")
        optimizer = build_optimizer(new, OptimizerConfig(lr=1e-2), {})
        for _ in range(3):
            train_step(new, optimizer, torch.randint(20, (2, 9)))
        gate = new.blocks[0].feed_forward.gate.weight
        assert ((gate[:24] - gate[24:]).abs().max().item() > 1e-6) == apart


def test_new_blocks_and_routers_start_with_fresh_state() -> None:
    torch.manual_seed(0)
    old = make(ModelConfig(vocab_size=20, dim=16, num_layers=2, num_heads=2))
    optimizer = build_optimizer(old, OptimizerConfig(), {})
    train_step(old, optimizer, torch.randint(20, (2, 9)))
    state = {name: optimizer.state[p] for name, p in old.named_parameters()}
    to = stage(GrowthTarget(num_layers=3, moe=MoEConfig(2, 1, layers=(0, 2))), upcycle="drop", drop_ratio=0.5)
    transition = build_transition(network_source(old, state, {}), to)
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


BASE = ModelConfig(vocab_size=20, dim=48, num_layers=4, num_heads=3)


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
        (GrowthTarget(num_layers=4), "changes nothing"),
    ],
)
def test_targets_that_cannot_be_reached_are_refused(target: GrowthTarget, words: str) -> None:
    with pytest.raises(InputError) as caught:
        target_config(BASE, stage(target))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_head_keeps_its_channels() -> None:
    assert target_config(BASE, stage(GrowthTarget(dim=56))).head_size == 16
    assert target_config(BASE, stage(GrowthTarget(dim=64, num_heads=4))).head_dim is None


@pytest.mark.parametrize(
    ("moe", "words"),
    [
        (MoEConfig(8, 2, expert_dim=32), "changes more of a mixture than num_experts"),
        (MoEConfig(6, 2), "num_experts=6, top_k=2 must be a multiple of the source's 4 experts"),
        (MoEConfig(8, 1), "at least its top_k=2"),
    ],
)
def test_a_mixture_only_gets_more_experts(moe: MoEConfig, words: str) -> None:
    routed = dataclasses.replace(BASE, moe=MoEConfig(4, 2))
    with pytest.raises(InputError, match=words):
        target_config(routed, stage(GrowthTarget(moe=moe)))


def test_a_deepened_mixture_keeps_the_kind_of_each_layer() -> None:
    routed = dataclasses.replace(BASE, moe=MoEConfig(4, 2, every=2))
    assert target_config(routed, stage(GrowthTarget(num_layers=8))).routed_layers == (2, 3, 6, 7)


@pytest.mark.parametrize(
    "fields", [{"at_step": 1, "at_tokens": 5}, {"at_step": 0}, {"at_tokens": 0}, {"at_step": 1, "drop_ratio": 0.0}]
)
def test_stages_that_make_no_sense_are_refused(fields: dict) -> None:
    with pytest.raises(InputError):
        GrowthStage(GrowthTarget(dim=96), **fields)


@pytest.mark.parametrize(
    ("moe", "exact"),
    [
        (MoEConfig(4, 2, capacity=CapacityConfig(factor=0.5, at_evaluation=True)), True),
        (MoEConfig(4, 2, router=RouterConfig(score="sigmoid", bias_update_rate=1e-3)), True),
        (MoEConfig(4, 2, router=RouterConfig(gate_scale=2.5)), True),
        (MoEConfig(4, 2, renormalize=False), False),
        (
            MoEConfig(4, 2, router=RouterConfig("gshard"), capacity=CapacityConfig()),
            False,
        ),  # its gates add up to 1 - 1e-9
    ],
)
def test_copies_are_exact_where_gates_add_up_to_one(moe: MoEConfig, exact: bool) -> None:
    torch.manual_seed(0)
    old = make(ModelConfig(vocab_size=20, dim=16, num_layers=2, num_heads=2))
    grown = apply_stage(network_source(old, {}, {}), stage(GrowthTarget(moe=moe), upcycle="copy"), "cpu")
    assert grown.transition.is_exact == exact
    tokens = torch.randint(20, (2, 9))
    new = grown.network
    with torch.no_grad():
        change = (logits(old, tokens) - new.logits(new(tokens, decoding=True)[0])).abs().max().item()
    assert not exact or change < EXACT
    for layer in new.routed_layers():
        assert layer.router.selection_bias_E is None or layer.router.selection_bias_E.abs().max() == 0


def test_a_new_hybridnorm_block_is_closed_by_its_gains() -> None:
    torch.manual_seed(0)
    old = make(ModelConfig(vocab_size=20, dim=16, num_layers=2, num_heads=2, norm_structure="hybridnorm"))
    block = grow(old, stage(GrowthTarget(num_layers=3))).blocks[1]
    for gain, writer in (
        (block.attention_post_norm.weight, block.attention.o_proj.weight),
        (block.feed_forward_post_norm.weight, block.feed_forward.down.weight),
    ):
        assert gain.abs().max() == 0 and writer.abs().max() > 0


def test_training_settings_do_not_name_a_transition() -> None:
    plain, heavy = (stage(GrowthTarget(moe=MoEConfig(4, 2, balance_loss_weight=w))).identity for w in (0.01, 1.0))
    assert plain == heavy
    biased = [
        stage(GrowthTarget(moe=MoEConfig(4, 2, router=RouterConfig(bias_update_rate=r)))).identity for r in (1e-3, 1e-2)
    ]
    assert biased[0] == biased[1] != plain
    assert stage(GrowthTarget(moe=MoEConfig(4, 1))).identity != plain

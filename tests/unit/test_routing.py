"""The routed-expert layer against its two references: outputs, losses, what it reports, and every gradient."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modules.config import ModelConfig
from modules.errors import InputError
from modules.functional.routing import moved_bias, queue_positions
from modules.layers.attention import rotary_angles
from modules.layers.experts import RoutedExperts
from modules.layers.transformer import Transformer
from modules.moe_config import CapacityConfig, MoEConfig, RouterConfig
from tests.conftest import TOLERANCE
from tests.reference import gshard as einsum_form
from tests.reference import routing as loops

DIM = 16
GSHARD = RouterConfig(kind="gshard")
BY_EXPERTS = {"router": RouterConfig(kind="expert_choice"), "renormalize": False, "balance_loss_weight": 0.0}
DECODING = st.sampled_from([False, False, False, True])
DTYPES = st.sampled_from([torch.float64, torch.float32])
FACTORS = st.sampled_from([0.1, 0.5, 1.0, 1.25, 2.0, 9.0])


# -- layers and inputs -------------------------------------------------------------------------------------------------


def make_layer(moe: MoEConfig, dtype: torch.dtype = torch.float64, lopsided: bool = False) -> RoutedExperts:
    """A layer with random weights; a lopsided router sends tokens of positive entries to the first experts."""
    layer = RoutedExperts(ModelConfig(vocab_size=8, dim=DIM, num_heads=2, moe=moe)).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
        if layer.router.selection_bias_E is not None:
            layer.router.selection_bias_E.normal_(std=0.2)
        if lopsided:
            falling = torch.arange(moe.num_experts, 0, -1, dtype=dtype)
            layer.router.weight.copy_(falling[:, None].expand(-1, DIM) / DIM)
    return layer


def make_hidden(batch: int, length: int, dtype: torch.dtype = torch.float64, lopsided: bool = False) -> Tensor:
    hidden = torch.randn(batch, length, DIM, dtype=dtype)
    return (hidden.abs() if lopsided else hidden).requires_grad_()


def gradients(loss: Tensor, layer: nn.Module, hidden: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [hidden, *layer.parameters()]))


def assert_is(layer: RoutedExperts, hidden: Tensor, want: Any, decoding: bool = False) -> None:
    """Output, losses, dropped shares and all gradients are those of the reference."""
    close = {"rtol": TOLERANCE[hidden.dtype], "atol": TOLERANCE[hidden.dtype]}
    out, stats = layer(hidden, decoding=decoding)
    torch.testing.assert_close(out, want.output_BLD, **close)
    torch.testing.assert_close(stats.balance_loss, want.balance, **close)
    torch.testing.assert_close(stats.z_loss, want.z, **close)
    torch.testing.assert_close(stats.dropped_K, hidden.new_tensor(want.dropped), **close)
    if isinstance(want, loops.Routed):
        assert stats.tokens_per_expert_E.tolist() == want.tokens_per_expert
    probe = torch.randn_like(out)
    got = gradients((out * probe).sum() + stats.balance_loss + stats.z_loss, layer, hidden)
    expected = gradients((want.output_BLD * probe).sum() + want.balance + want.z, layer, hidden)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **close)


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """What every kind of router is tried on."""
    return {
        "batch": draw(st.integers(1, 3)),
        "length": draw(st.integers(1, 8)),
        "training": draw(st.sampled_from([True, True, False])),
        "dtype": draw(DTYPES),
        "lopsided": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


def draw_capacity(draw: st.DrawFn, shape: dict[str, Any], factor: float | None = None) -> CapacityConfig:
    """Groups divide the tokens of a micro-batch in training; in evaluation they need not."""
    tokens = shape["batch"] * shape["length"]
    sizes = divisors(tokens) if shape["training"] else list(range(1, tokens + 2))
    return CapacityConfig(
        factor=draw(FACTORS) if factor is None else factor,
        rounding=draw(st.sampled_from([1, 4])),
        group_size=draw(st.sampled_from([None, *sizes])),
        at_evaluation=draw(st.booleans()),
    )


def draw_shared(draw: st.DrawFn) -> dict[str, Any]:
    number = draw(st.integers(0, 2))
    if number == 0:
        return {}
    sizes = {"num_shared_experts": number, "shared_expert_dim": draw(st.sampled_from([None, 8]))}
    return sizes | {"shared_gate": draw(st.booleans())}


@st.composite
def top_k_cases(draw: st.DrawFn) -> tuple[dict[str, Any], MoEConfig]:
    shape, num_experts = draw(shapes()), draw(st.sampled_from([4, 8, 6, 3, 2, 1]))
    top_k = draw(st.integers(1, num_experts))
    groups = draw(st.sampled_from(divisors(num_experts)))
    fewest = -(-top_k * groups // num_experts)
    router = RouterConfig(
        score=draw(st.sampled_from(["softmax", "softmax_of_top_k", "sigmoid"])),
        soft_cap=draw(st.sampled_from([None, 3.0])),
        gate_scale=draw(st.sampled_from([1.0, 2.5])),
        bias_update_rate=draw(st.sampled_from([0.0, 1e-3])),
        expert_groups=groups,
        top_groups=draw(st.integers(fewest, groups)),
    )
    capacity = draw_capacity(draw, shape) if draw(st.sampled_from([True, True, False])) else None
    levels = ["micro_batch", "sequence", "global", *(["group"] if capacity else [])]
    return shape, MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        expert_dim=24,
        renormalize=router.score == "softmax_of_top_k" or draw(st.booleans()),
        router=router,
        capacity=capacity,
        balance_level=draw(st.sampled_from(levels)),
        **draw_shared(draw),
    )


@st.composite
def gshard_cases(draw: st.DrawFn) -> tuple[dict[str, Any], MoEConfig]:
    shape = draw(shapes())
    router = replace(GSHARD, soft_cap=draw(st.sampled_from([None, 3.0])))
    capacity = draw_capacity(draw, shape)
    return shape, MoEConfig(draw(st.integers(2, 6)), top_k=2, expert_dim=24, router=router, capacity=capacity)


@st.composite
def expert_choice_cases(draw: st.DrawFn) -> tuple[dict[str, Any], MoEConfig]:
    shape, num_experts = draw(shapes()), draw(st.integers(1, 6))
    top_k = draw(st.integers(1, num_experts))
    router = RouterConfig(
        kind="expert_choice",
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        soft_cap=draw(st.sampled_from([None, 3.0])),
        gate_scale=draw(st.sampled_from([1.0, 2.5])),
    )
    capacity = draw_capacity(draw, shape, float(top_k))
    options = {**BY_EXPERTS, "router": router, "capacity": capacity, **draw_shared(draw)}
    return shape, MoEConfig(num_experts, top_k, expert_dim=24, **options)


def set_up(shape: dict[str, Any], moe: MoEConfig) -> tuple[RoutedExperts, Tensor]:
    torch.manual_seed(shape["seed"])
    layer = make_layer(moe, shape["dtype"], shape["lopsided"]).train(shape["training"])
    return layer, make_hidden(shape["batch"], shape["length"], shape["dtype"], shape["lopsided"])


# -- against the references --------------------------------------------------------------------------------------------


@given(case=top_k_cases(), decoding=DECODING)
@settings(max_examples=250)
def test_top_k_is_the_reference(case: tuple[dict[str, Any], MoEConfig], decoding: bool) -> None:
    layer, hidden = set_up(*case)
    assert_is(layer, hidden, loops.routed_experts(layer, hidden, decoding), decoding)


@pytest.mark.parametrize(("groups", "top_groups", "top_k"), [(4, 2, 3), (2, 1, 4), (4, 3, 2), (8, 4, 2)])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_groups_of_experts_are_the_reference(groups: int, top_groups: int, top_k: int, score: Any) -> None:
    """A token's best experts are passed over where their group is not among its best."""
    torch.manual_seed(0)
    router = RouterConfig(score=score, bias_update_rate=1e-3, expert_groups=groups, top_groups=top_groups)
    layer, hidden = make_layer(MoEConfig(8, top_k, expert_dim=24, router=router)), make_hidden(2, 16)
    assert_is(layer, hidden, loops.routed_experts(layer, hidden))
    freely = make_layer(replace(layer.router.moe, router=RouterConfig(score=score, bias_update_rate=1e-3)))
    freely.load_state_dict(layer.state_dict())
    assert torch.equal(freely(hidden)[0], layer(hidden)[0]) == (groups == 8)  # a group of one is an expert


@given(case=gshard_cases())
@settings(max_examples=150)
def test_gshard_is_the_einsum_form(case: tuple[dict[str, Any], MoEConfig]) -> None:
    shape, moe = case[0], replace(case[1], capacity=replace(case[1].capacity, at_evaluation=True))
    layer, hidden = set_up(shape, moe)
    batch, length, capacity = shape["batch"], shape["length"], moe.capacity
    size = capacity.group_size or length
    if batch * length % size:  # in evaluation only
        size = length
    groups = (batch, length // size, size) if length % size == 0 else (1, batch * length // size, size)
    slots = einsum_form.capacity(size, capacity.factor, moe.num_experts, capacity.rounding)
    assert_is(layer, hidden, einsum_form.gshard_top_2(layer, hidden, groups, slots))


@given(case=gshard_cases(), decoding=DECODING)
@settings(max_examples=80)
def test_gshard_is_the_reference(case: tuple[dict[str, Any], MoEConfig], decoding: bool) -> None:
    layer, hidden = set_up(*case)
    assert_is(layer, hidden, loops.routed_experts(layer, hidden, decoding), decoding)


@given(case=expert_choice_cases())
@settings(max_examples=120)
def test_expert_choice_is_the_reference(case: tuple[dict[str, Any], MoEConfig]) -> None:
    layer, hidden = set_up(*case)
    assert_is(layer, hidden, loops.routed_experts(layer, hidden))


@given(
    top_k=st.integers(1, 4),
    num_experts=st.integers(4, 6),
    groups=st.integers(1, 3),
    group_size=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_places_are_those_of_a_queue(top_k: int, num_experts: int, groups: int, group_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    ids_TK = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(groups * group_size)])
    want = torch.zeros_like(ids_TK)
    for group in range(groups):
        queues: list[list[int]] = [[] for _ in range(num_experts)]
        for k in range(top_k):
            for t in range(group * group_size, (group + 1) * group_size):
                want[t, k] = len(queues[ids_TK[t, k]])
                queues[ids_TK[t, k]].append(t)
    assert torch.equal(queue_positions(ids_TK, num_experts, group_size), want)


# -- slots -------------------------------------------------------------------------------------------------------------


def test_all_tokens_to_one_expert_of_one_slot() -> None:
    torch.manual_seed(0)
    moe = MoEConfig(4, 1, expert_dim=24, capacity=CapacityConfig(factor=0.5), balance_level="group")
    layer, hidden = make_layer(moe, lopsided=True), make_hidden(2, 8, lopsided=True)
    out, stats = layer(hidden)
    assert stats.tokens_per_expert_E.tolist() == [16, 0, 0, 0] and stats.dropped_K.tolist() == [7 / 8]
    assert (out[:, 0] != 0).any(-1).all() and (out[:, 1:] == 0).all()
    out.sum().backward()
    assert layer.experts.gate.grad is not None
    assert layer.experts.gate.grad[0].any() and not layer.experts.gate.grad[1:].any()
    assert hidden.grad is not None and not hidden.grad[:, 1:].any()


@pytest.mark.parametrize(
    ("group_size", "factor", "rounding", "slots"),
    [(32, 2.0, 1, 8), (30, 2.0, 1, 7), (30, 2.0, 4, 8), (2, 2.0, 4, 1), (4, 2.0, 4, 1), (8, 2.0, 4, 4), (1, 0.1, 1, 1)],
)
def test_slots_of_eight_experts(group_size: int, factor: float, rounding: Any, slots: int) -> None:
    assert CapacityConfig(factor, rounding).slots(group_size, 8) == slots
    assert einsum_form.capacity(group_size, factor, 8, rounding) == slots


@pytest.mark.parametrize("router", [GSHARD, RouterConfig()])
@pytest.mark.parametrize("training", [True, False])
def test_decoding_and_evaluation_drop_nothing_unless_asked(router: RouterConfig, training: bool) -> None:
    torch.manual_seed(0)
    tight = CapacityConfig(factor=0.1)
    layer = make_layer(MoEConfig(4, 2, expert_dim=24, router=router, capacity=tight), lopsided=True)
    hidden = make_hidden(2, 6, lopsided=True)
    cut, cut_stats = layer(hidden)
    assert cut_stats.dropped_K.tolist() == [5 / 6, 5 / 6]
    layer.train(training)
    whole, stats = layer(hidden, decoding=True)
    assert not stats.dropped_K.any() and not torch.allclose(cut, whole)
    layer.eval()
    assert torch.equal(layer(hidden)[0], whole)
    layer.router.moe = replace(layer.router.moe, capacity=replace(tight, at_evaluation=True))
    assert torch.equal(layer(hidden)[0], cut) and torch.equal(layer(hidden, decoding=True)[0], whole)


@pytest.mark.parametrize("options", [{"router": GSHARD}, {}, BY_EXPERTS])
def test_groups_divide_the_tokens_in_training(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    capacity = CapacityConfig(factor=2.0, group_size=4, at_evaluation=True)
    layer = make_layer(MoEConfig(4, 2, expert_dim=24, capacity=capacity, **options))
    hidden = make_hidden(2, 5)
    with pytest.raises(InputError, match=r"capacity\.group_size=4 does not divide the 10 tokens"):
        layer(hidden)
    with_sequences = make_layer(MoEConfig(4, 2, expert_dim=24, capacity=replace(capacity, group_size=None), **options))
    with_sequences.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(hidden)[0], with_sequences.eval()(hidden)[0])


def test_expert_choice_cannot_decode() -> None:
    layer = make_layer(MoEConfig(4, 2, capacity=CapacityConfig(), **BY_EXPERTS))
    with pytest.raises(InputError, match="expert_choice cannot decode"):
        layer(make_hidden(1, 4), decoding=True)


# -- repeatability and precision ---------------------------------------------------------------------------------------

KINDS = {
    "dropless": {},
    "capacity": {"capacity": CapacityConfig(factor=1.0), "num_shared_experts": 1, "shared_gate": True},
    "gshard": {"router": GSHARD, "capacity": CapacityConfig()},
    "sigmoid": {"router": RouterConfig(score="sigmoid", bias_update_rate=1e-3, gate_scale=2.5)},
    "expert_choice": {**BY_EXPERTS, "capacity": CapacityConfig()},
}
BY_KIND = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


@BY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_bit_equal(options: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, hidden = make_layer(MoEConfig(8, 2, expert_dim=24, **options), dtype), make_hidden(4, 64, dtype)
    runs = []
    for _ in range(2):
        out, stats = layer(hidden)
        loss = out.float().square().sum() + stats.balance_loss + stats.z_loss
        runs.append([out, stats.balance_loss, stats.z_loss, *gradients(loss, layer, hidden)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@BY_KIND
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_close_to_float32(options: dict[str, Any], autocast: bool) -> None:
    torch.manual_seed(0)
    layer = make_layer(MoEConfig(8, 2, expert_dim=24, **options), torch.bfloat16)
    hidden = make_hidden(2, 16, torch.bfloat16)
    wide, wide_hidden = make_layer(layer.router.moe, torch.float32), hidden.detach().float().requires_grad_()
    wide.load_state_dict(layer.state_dict())
    want, plain = wide(wide_hidden)
    low, low_hidden = (wide, wide_hidden) if autocast else (layer, hidden)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, stats = low(low_hidden)
    assert out.dtype == torch.bfloat16
    probe = torch.randn_like(out)
    got = gradients((out * probe).sum(), low, low_hidden)
    expected = gradients((want * probe).sum(), wide, wide_hidden)
    for a, b in zip([out, *got], [want, *expected], strict=True):
        assert (a.float() - b).norm() < TOLERANCE[torch.bfloat16] * b.norm()
    for name in ("z_loss", "logit_rms", "probabilities_GE", "tokens_per_expert_E"):  # the router is as in float32
        torch.testing.assert_close(getattr(stats, name), getattr(plain, name), rtol=0, atol=0)


def test_selection_bias_stays_in_float32() -> None:
    layer = make_layer(MoEConfig(4, 2, router=RouterConfig(bias_update_rate=1e-3)), torch.float32)
    assert layer.router.selection_bias_E is not None
    bias_E = torch.tensor([1.001, -0.999, 0.0, 1e-3])
    layer.router.selection_bias_E.copy_(bias_E)
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        layer.to(dtype)
        assert layer.router.weight.dtype == dtype and layer.router.selection_bias_E.dtype == torch.float32
        assert torch.equal(layer.router.selection_bias_E, bias_E)
    assert torch.equal(layer.state_dict()["router.selection_bias_E"], bias_E)
    assert "router.selection_bias_E" not in dict(layer.named_parameters())


def test_bias_moves_towards_an_even_load() -> None:
    counts_NE = torch.tensor([[4, 0, 2, 2], [3, 3, 3, 3], [9, 1, 1, 1]])
    bias_NE = torch.tensor([[0.5, 0.0, -0.5, 0.0]]).expand(3, -1)
    moved_NE = moved_bias(bias_NE, counts_NE, 0.25)
    assert moved_NE.tolist() == [[0.25, 0.25, -0.5, 0.0], [0.5, 0.0, -0.5, 0.0], [0.25, 0.25, -0.25, 0.25]]
    assert torch.equal(moved_bias(bias_NE[2], counts_NE[2], 0.25), moved_NE[2])
    assert bias_NE[0].tolist() == [0.5, 0.0, -0.5, 0.0]


# -- the block around the layer ----------------------------------------------------------------------------------------


def rms_norm(hidden: Tensor, gain: Tensor, eps: float) -> Tensor:
    return hidden / (hidden.square().mean(-1, keepdim=True) + eps).sqrt() * gain


@pytest.mark.parametrize("moe", [None, MoEConfig(4, 2, expert_dim=24)])
@pytest.mark.parametrize("structure", ["prenorm", "hybridnorm", "postnorm"])
def test_norms_of_a_block(structure: Any, moe: MoEConfig | None) -> None:
    torch.manual_seed(0)
    shape = {"dim": DIM, "num_layers": 1, "num_heads": 2, "norm_eps": 1e-3, "tie_embeddings": True}
    network = Transformer(ModelConfig(8, norm_structure=structure, moe=moe, **shape)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    block, tokens = network.blocks[0], torch.randint(8, (2, 5))
    h = network.embedding(tokens)
    rotary = rotary_angles(torch.arange(5)[None], network.config)
    for branch, norm, post in (
        (lambda y: block.attention(y, rotary, None, 0), block.attention_norm, block.attention_post_norm),
        (lambda y: block.feed_forward(y)[0], block.feed_forward_norm, block.feed_forward_post_norm),
    ):
        written = branch(h if structure == "postnorm" else rms_norm(h, norm.weight, 1e-3))
        h = h + (written if structure == "prenorm" else rms_norm(written, post.weight, 1e-3))
    want, (out, stats) = rms_norm(h, network.final_norm.weight, 1e-3), network(tokens)
    assert len(stats) == (moe is not None)
    close = {"rtol": TOLERANCE[torch.float64], "atol": TOLERANCE[torch.float64]}
    torch.testing.assert_close(out, want, **close)
    probe = torch.randn_like(out)
    found = [torch.autograd.grad((output * probe).sum(), list(network.parameters())) for output in (out, want)]
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, **close)

"""Layers against their obvious references, in float64 and float32, outputs and gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modules.config import ModelConfig
from modules.errors import InputError
from modules.layers.attention import Attention, KVCache, rotary_angles
from modules.layers.experts import RoutedExperts
from modules.layers.grouped import grouped_linear
from modules.layers.transformer import Transformer, document_mask
from modules.moe_config import MoEConfig
from tests.conftest import TOLERANCE
from tests.reference import layers as reference


def randomize(module: nn.Module, dtype: torch.dtype, std: float = 0.4) -> nn.Module:
    module.to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * std + (1.0 if parameter.ndim == 1 else 0.0))
    return module


def gradients(loss: torch.Tensor, module: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [inputs, *module.parameters()]))


@given(
    kv=st.sampled_from([1, 2, 4]),
    length=st.integers(1, 7),
    masked=st.booleans(),
    bias=st.booleans(),
    norm=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attention_is_the_reference(kv: int, length: int, masked: bool, bias: bool, norm: bool, seed: int) -> None:
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=8, dim=16, num_heads=4, num_kv_heads=kv, head_dim=6, qkv_bias=bias, qk_norm=norm, rope_theta=100.0
    )
    layer = randomize(Attention(config), torch.float64)
    hidden = torch.randn(2, length, 16, dtype=torch.float64, requires_grad=True)
    documents = torch.randint(0, 2, (2, length)).cumsum(1) if masked else None
    rotary = rotary_angles(torch.arange(length)[None], 6, 100.0)
    out = layer(hidden, rotary, None if documents is None else document_mask(documents), 0)
    want = reference.attention(layer, hidden, 100.0, documents)
    torch.testing.assert_close(out, want, rtol=0, atol=TOLERANCE[torch.float64])
    probe = torch.randn_like(out)
    for got, expected in zip(
        gradients((out * probe).sum(), layer, hidden), gradients((want * probe).sum(), layer, hidden), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[torch.float64])


@given(
    tokens=st.integers(1, 9),
    num_experts=st.integers(1, 6),
    top_k=st.integers(1, 3),
    renormalize=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    lopsided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_routed_experts_are_the_reference(
    tokens: int, num_experts: int, top_k: int, renormalize: bool, dtype: torch.dtype, lopsided: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    moe = MoEConfig(num_experts, min(top_k, num_experts), expert_dim=24, renormalize=renormalize)
    layer = randomize(RoutedExperts(ModelConfig(vocab_size=8, dim=16, num_heads=2, moe=moe)), dtype)
    hidden = torch.randn(1, tokens, 16, dtype=dtype)
    if lopsided:  # every token goes to the same experts: the others get no row
        hidden = hidden.abs()
        with torch.no_grad():
            layer.router.weight.copy_(torch.arange(num_experts, 0, -1)[:, None].to(dtype).expand(-1, 16) / 16)
    hidden.requires_grad_()
    out, stats = layer(hidden)
    want, balance, z = reference.routed_experts(layer, hidden)
    close = {"rtol": 10 * TOLERANCE[dtype], "atol": 10 * TOLERANCE[dtype]}
    torch.testing.assert_close(out, want, **close)
    torch.testing.assert_close(stats.balance_loss, balance, **close)
    torch.testing.assert_close(stats.z_loss, z, **close)
    assert stats.tokens_per_expert_E.sum() == tokens * moe.top_k
    probe = torch.randn_like(out)
    got = gradients((out * probe).sum() + stats.balance_loss + stats.z_loss, layer, hidden)
    expected = gradients((want * probe).sum() + balance + z, layer, hidden)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **close)


def test_experts_without_rows_get_zero_gradient() -> None:
    weight = torch.randn(3, 8, 8, requires_grad=True)
    rows = torch.randn(4, 8, requires_grad=True)
    (grouped_linear(rows, weight, torch.tensor([0, 4, 0])) * torch.randn(4, 8)).sum().backward()
    assert weight.grad is not None
    assert weight.grad[0].abs().max() == 0 and weight.grad[2].abs().max() == 0
    assert weight.grad[1].abs().max() > 0


def test_router_stays_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    layer = RoutedExperts(ModelConfig(vocab_size=8, dim=16, num_heads=2, moe=MoEConfig(4, 2)))
    randomize(layer, torch.float32)
    hidden = torch.randn(1, 5, 16)
    _, plain = layer(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        out, stats = layer(hidden)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(stats.z_loss, plain.z_loss, rtol=0, atol=0)


@pytest.mark.parametrize("moe", [None, MoEConfig(4, 2)])
def test_cache_equals_whole_forward(moe: MoEConfig | None) -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=30, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, max_seq_len=12, moe=moe)
    network = randomize(Transformer(config), torch.float64)
    tokens = torch.randint(30, (3, 10))
    whole, _ = network(tokens)
    cache = KVCache(config, 3, 10, dtype=torch.float64)
    parts = [network(part, cache=cache)[0] for part in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:])]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)
    with pytest.raises(InputError, match="13 tokens"):
        KVCache(config, 3, 13)


def test_left_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=30, dim=16, num_layers=2, num_heads=2, max_seq_len=12)
    network = randomize(Transformer(config), torch.float64)
    tokens = torch.randint(30, (1, 5))
    whole, _ = network(tokens)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), tokens), dim=1)
    cache = KVCache(config, 1, 8, dtype=torch.float64, start_B=torch.tensor([3]))
    out, _ = network(padded, cache=cache)
    torch.testing.assert_close(out[:, 3:], whole, rtol=0, atol=1e-9)


def test_documents_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    network = randomize(Transformer(ModelConfig(vocab_size=30, dim=16, num_layers=2, num_heads=2)), torch.float64)
    first, second = torch.randint(30, (1, 4)), torch.randint(30, (1, 3))
    packed, _ = network(
        torch.cat((first, second), 1),
        position_ids_BL=torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
        document_ids_BL=torch.tensor([[0, 0, 0, 0, 1, 1, 1]]),
    )
    torch.testing.assert_close(packed[:, 4:], network(second)[0], rtol=0, atol=1e-9)


def test_too_long_a_sequence_is_refused() -> None:
    network = Transformer(ModelConfig(vocab_size=30, dim=16, num_layers=1, num_heads=2, max_seq_len=4))
    with pytest.raises(InputError, match="sequence of 5 tokens is longer than max_seq_len=4"):
        network(torch.zeros(1, 5, dtype=torch.long))

"""Layers against their obvious references, in float64 and float32, outputs and gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modules.config import ModelConfig, RopeScaling
from modules.errors import InputError
from modules.functional.attention import _BlockwiseAttention
from modules.layers.attention import Attention, KVCache, rotary_angles
from modules.layers.grouped import grouped_linear
from modules.layers.norm import RMSNorm
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
    norm=st.sampled_from([None, "head", "projection"]),
    scaling=st.sampled_from([None, RopeScaling("linear", 3.0), RopeScaling("llama3", 5.0, 1.0, 4.0, 90)]),
    seed=st.integers(0, 99),
)
def test_attention_is_the_reference(
    kv: int, length: int, masked: bool, bias: bool, norm: Any, scaling: RopeScaling | None, seed: int
) -> None:
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=8,
        dim=16,
        num_heads=4,
        num_kv_heads=kv,
        head_dim=6,
        qkv_bias=bias,
        o_bias=bias and seed % 2 == 0,
        qk_norm=norm is not None,
        qk_norm_scope=norm or "head",
        rope_theta=100.0,
        rope_scaling=scaling,
    )
    layer = randomize(Attention(config), torch.float64)
    hidden = torch.randn(2, length, 16, dtype=torch.float64, requires_grad=True)
    documents = torch.randint(0, 2, (2, length)).cumsum(1) if masked else None
    rotary = rotary_angles(torch.arange(length)[None], config)
    out = layer(hidden, rotary, None if documents is None else document_mask(documents), 0)
    want = reference.attention(layer, config, hidden, documents)
    torch.testing.assert_close(out, want, rtol=0, atol=TOLERANCE[torch.float64])
    probe = torch.randn_like(out)
    for got, expected in zip(
        gradients((out * probe).sum(), layer, hidden), gradients((want * probe).sum(), layer, hidden), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 4, 6)])
def test_norm_is_the_plain_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = randomize(RMSNorm(6, eps=1e-3), dtype)
    hidden = torch.randn(shape, dtype=dtype, requires_grad=True)
    out = norm(hidden)
    want = hidden / (hidden.square().mean(dim=-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(out, want, **close)
    probe = torch.randn_like(out)
    pairs = (gradients((output * probe).sum(), norm, hidden) for output in (out, want))
    for got, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(got, expected, **close)


def test_experts_without_rows_get_zero_gradient() -> None:
    weight = torch.randn(3, 8, 8, requires_grad=True)
    rows = torch.randn(4, 8, requires_grad=True)
    (grouped_linear(rows, weight, torch.tensor([0, 4, 0])) * torch.randn(4, 8)).sum().backward()
    assert weight.grad is not None
    assert weight.grad[0].abs().max() == 0 and weight.grad[2].abs().max() == 0
    assert weight.grad[1].abs().max() > 0


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


@given(
    length=st.integers(1, 40),
    block=st.integers(1, 16),
    kv=st.sampled_from([1, 2, 4]),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_blockwise_attention_is_the_kernel(
    length: int, block: int, kv: int, masked: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    shapes = ((2, 4, length, 6), (2, kv, length, 6), (2, kv, length, 6))
    wide = [torch.randn(shape).to(dtype).double().requires_grad_() for shape in shapes]
    narrow = [tensor.detach().to(dtype).requires_grad_() for tensor in wide]
    mask = document_mask(torch.randint(0, 2, (2, length)).cumsum(1)) if masked else None
    want = F.scaled_dot_product_attention(*wide, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    got = _BlockwiseAttention.apply(*narrow, mask, block)
    probe = torch.randn_like(want).to(dtype)
    gradients_wanted = torch.autograd.grad(want, wide, probe.double())
    for a, b in zip((got, *torch.autograd.grad(got, narrow, probe)), (want, *gradients_wanted), strict=True):
        error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1.0)
        assert error < 2 * TOLERANCE[dtype]

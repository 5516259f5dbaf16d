"""The chunked cross-entropy is plain cross-entropy, to the last gradient."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from modules.functional.losses import IGNORE_INDEX, linear_cross_entropy, losses_and_gradient
from tests.conftest import TOLERANCE


@given(
    tokens=st.integers(1, 20),
    chunk=st.integers(1, 25),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    ignored=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_equals_cross_entropy(tokens: int, chunk: int, dtype: torch.dtype, ignored: int, seed: int) -> None:
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 6, dtype=dtype, requires_grad=True)
    targets = torch.randint(11, (tokens,))
    targets[:ignored] = IGNORE_INDEX
    total, losses = linear_cross_entropy(hidden, weight, targets, chunk)
    want = F.cross_entropy(hidden @ weight.T, targets, reduction="none", ignore_index=IGNORE_INDEX)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(losses, want.detach(), **close)
    torch.testing.assert_close(total, want.sum(), **close)
    got = torch.autograd.grad(3 * total, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(3 * want.sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, **close)


def test_autocast_multiplies_in_bfloat16_and_adds_up_in_float32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    targets = torch.randint(40, (50,))
    with torch.autocast("cpu", torch.bfloat16):
        total, losses = linear_cross_entropy(hidden, weight, targets, 16)
    assert total.dtype == losses.dtype == torch.float32
    want = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(total, want, rtol=TOLERANCE[torch.bfloat16], atol=0)
    got = torch.autograd.grad(total, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(want, (hidden, weight)), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)
    assert not torch.equal(got[1], got[1].bfloat16().float())  # a sum over chunks that nothing has rounded


def test_losses_where_probabilities_underflow() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = 100 * torch.randn(20, 6), torch.randn(11, 6), torch.randint(11, (20,))
    _, losses = linear_cross_entropy(hidden, weight, targets, 7)
    want = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    assert want.max() > 300
    torch.testing.assert_close(losses, want, rtol=TOLERANCE[torch.float32], atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("chunk", [7, 64])
def test_no_more_than_a_chunk_of_logits_is_alive(chunk: int) -> None:
    hidden, weight, targets = torch.randn(64, 4, requires_grad=True), torch.randn(9, 4), torch.randint(9, (64,))
    buffers = set()

    def watched(logits: torch.Tensor, targets: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
        buffers.add((logits.untyped_storage().data_ptr(), logits.untyped_storage().nbytes()))
        return losses_and_gradient(logits, targets, wide)

    linear_cross_entropy(hidden, weight, targets, chunk, watched)
    (buffer,) = buffers  # of all chunks
    assert buffer[1] == chunk * 9 * 4


def test_gradients_can_be_had_once() -> None:
    hidden, targets = torch.randn(5, 4, requires_grad=True), torch.randint(9, (5,))
    total, _ = linear_cross_entropy(hidden, torch.randn(9, 4), targets)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()

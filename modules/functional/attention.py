"""Scaled-dot-product attention: torch's kernel, and on CPUs a blockwise form that is faster at training lengths.

Letters: B batch, L queries, M keys, H query heads, G key-value heads, N query heads of one key-value head (H = G·N),
C channels of a head, S queries of a block.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCKWISE_MAX_LEN = 1024
"""Longer sequences go to torch's kernel: the blockwise form keeps half of all probabilities for backward."""


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(query keyᵀ / sqrt C) value, from [B, H, L, C] and [B, G, M, C] to [B, H, L, C].

    Args:
        mask: True [B, 1, L, M] where a query sees a key, never a later one; None is causal, with L = M.
    """
    length = query.shape[2]
    if query.device.type == "cpu" and query.requires_grad and length == key.shape[2] <= BLOCKWISE_MAX_LEN:
        return _BlockwiseAttention.apply(query, key, value, mask, 64 if length <= 512 else 128)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


class _BlockwiseAttention(torch.autograd.Function):
    """Causal attention, a block of queries at a time, over the keys up to its last query.

    Half of the square is never computed, scores of one block stay in the cache, and matrix products are the fast ones.
    Forward and backward of 8 x 8 heads x 512 tokens take 0.53 of the kernel's time in bfloat16, 0.72 in float32
    (docs/log.md).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, block: int) -> Tensor:
        ctx.scale, ctx.block = query.shape[-1] ** -0.5, block
        key, value = key.contiguous(), value.contiguous()  # once, rather than in each product
        wide = torch.promote_types(key.dtype, torch.float32)
        wide_key = key.to(wide)  # scores of low precision would be off by more than their weights can bear
        output = _by_position(query, query.dtype)
        probabilities = []
        for rows, keys in _blocks(query.shape[2], block):
            scores = (_grouped(query[:, :, rows], key).to(wide) * ctx.scale) @ wide_key[:, :, :keys].mT
            _hide(scores, mask, rows, keys)
            weights = scores.softmax(dim=-1).to(query.dtype)
            output[:, :, rows] = _ungrouped(weights @ value[:, :, :keys], output[:, :, rows])
            probabilities.append(weights)
        ctx.save_for_backward(query, key, value, *probabilities)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *probabilities = ctx.saved_tensors
        wide = torch.promote_types(key.dtype, torch.float32)
        d_query = _by_position(query, query.dtype)
        d_key, d_value = _by_position(key, wide).zero_(), _by_position(value, wide).zero_()
        for (rows, keys), weights in zip(_blocks(query.shape[2], ctx.block), probabilities, strict=True):
            slope = _grouped(grads[0][:, :, rows], key).contiguous()
            d_value[:, :, :keys].add_(weights.mT @ slope)
            seen_value = value[:, :, :keys].contiguous()  # oneDNN takes six times as long to copy a transposed slice
            d_weights = slope @ seen_value.mT
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_query[:, :, rows] = _ungrouped(d_scores @ key[:, :, :keys], d_query[:, :, rows])
            d_key[:, :, :keys].add_(d_scores.mT @ _grouped(query[:, :, rows], key))
        return d_query.mul_(ctx.scale), d_key.mul_(ctx.scale).to(key.dtype), d_value.to(value.dtype), None, None


def _by_position(heads: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty [B, H, L, C] that lies in memory as the projections before and behind want it, [B, L, H, C]."""
    return torch.empty_like(heads.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)


def _blocks(length: int, block: int) -> Iterator[tuple[slice, int]]:
    """Each block of queries, and the number of keys that its last query may see."""
    for start in range(0, length, block):
        end = min(length, start + block)
        yield slice(start, end), end


def _grouped(heads: Tensor, key: Tensor) -> Tensor:
    """Query heads [B, H, S, C] below their key-value head: [B, G, N·S, C]."""
    return heads.unflatten(1, (key.shape[1], -1)).flatten(2, 3)


def _ungrouped(rows: Tensor, like: Tensor) -> Tensor:
    """[B, G, N·S, C] back to the shape of `like` [B, H, S, C]."""
    return rows.view(like.shape)


def _hide(scores: Tensor, mask: Tensor | None, rows: slice, keys: int) -> None:
    """Set scores [B, G, N·S, M] of what a query must not see to minus infinity."""
    size = rows.stop - rows.start
    by_query = scores.unflatten(2, (-1, size))
    if mask is None:  # only the square on the diagonal has anything to hide
        later = torch.full((size, size), float("-inf"), dtype=scores.dtype, device=scores.device).triu(1)
        by_query[..., rows.start :].add_(later)  # in a third of the time of masked_fill_
    else:
        by_query.masked_fill_(~mask[:, :, None, rows, :keys], float("-inf"))

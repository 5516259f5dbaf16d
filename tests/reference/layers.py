"""Layers written for reading: loops over heads and positions."""

import torch
from torch import Tensor

from modules.layers.attention import Attention


def attention(
    layer: Attention, hidden_BLD: Tensor, theta: float, document_ids_BL: Tensor | None, start: int = 0
) -> Tensor:
    """Causal grouped-query attention, one head and one query at a time; complex numbers turn the channels."""
    batch, length, _ = hidden_BLD.shape
    size = layer.head_dim
    query = layer.q_proj(hidden_BLD).view(batch, length, -1, size)
    key = layer.k_proj(hidden_BLD).view(batch, length, -1, size)
    value = layer.v_proj(hidden_BLD).view(batch, length, -1, size)
    query, key = layer.q_norm(query), layer.k_norm(key)
    num_heads, group = query.shape[2], query.shape[2] // key.shape[2]
    mixed = torch.zeros_like(query)
    for b in range(batch):
        for h in range(num_heads):
            q = _turn(query[b, :, h], theta, start)
            k = _turn(key[b, :, h // group], theta, start)
            for i in range(length):
                seen = [
                    j for j in range(i + 1) if document_ids_BL is None or document_ids_BL[b, i] == document_ids_BL[b, j]
                ]
                weights = torch.stack([q[i] @ k[j] for j in seen]).div(size**0.5).softmax(0)
                mixed[b, i, h] = sum(w * value[b, j, h // group] for w, j in zip(weights, seen, strict=True))
    return layer.o_proj(mixed.flatten(2))


def _turn(heads_LC: Tensor, theta: float, start: int) -> Tensor:
    length, size = heads_LC.shape
    pairs = torch.complex(heads_LC[:, : size // 2], heads_LC[:, size // 2 :])
    frequency = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.outer(torch.arange(start, start + length, dtype=torch.float64), frequency)
    turned = pairs * torch.polar(torch.ones_like(angle), angle).to(pairs.dtype)
    return torch.cat((turned.real, turned.imag), dim=-1)

"""Layers written for reading: loops over heads and positions."""

import math

import torch
from torch import Tensor

from modules.config import ModelConfig
from modules.layers.attention import Attention


def attention(
    layer: Attention, config: ModelConfig, hidden_BLD: Tensor, document_ids_BL: Tensor | None, start: int = 0
) -> Tensor:
    """Causal grouped-query attention, one head and one query at a time; complex numbers turn the channels."""
    batch, length, _ = hidden_BLD.shape
    size = layer.head_dim
    query, key, value = (project(hidden_BLD) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
    if config.qk_norm_scope == "projection":
        query, key = layer.q_norm(query), layer.k_norm(key)
    query, key, value = (flat.view(batch, length, -1, size) for flat in (query, key, value))
    if config.qk_norm_scope == "head":
        query, key = layer.q_norm(query), layer.k_norm(key)
    frequency = [_frequency(pair, config) for pair in range(size // 2)]
    num_heads, group = query.shape[2], query.shape[2] // key.shape[2]
    mixed = torch.zeros_like(query)
    for b in range(batch):
        for h in range(num_heads):
            q = _turn(query[b, :, h], frequency, start)
            k = _turn(key[b, :, h // group], frequency, start)
            for i in range(length):
                seen = [
                    j for j in range(i + 1) if document_ids_BL is None or document_ids_BL[b, i] == document_ids_BL[b, j]
                ]
                weights = torch.stack([q[i] @ k[j] for j in seen]).div(size**0.5).softmax(0)
                mixed[b, i, h] = sum(w * value[b, j, h // group] for w, j in zip(weights, seen, strict=True))
    return layer.o_proj(mixed.flatten(2))


def _turn(heads_LC: Tensor, frequency: list[float], start: int) -> Tensor:
    length, size = heads_LC.shape
    pairs = torch.complex(heads_LC[:, : size // 2], heads_LC[:, size // 2 :])
    positions = torch.arange(start, start + length, dtype=torch.float64)
    angle = torch.outer(positions, torch.tensor(frequency, dtype=torch.float64))
    turned = pairs * torch.polar(torch.ones_like(angle), angle).to(pairs.dtype)
    return torch.cat((turned.real, turned.imag), dim=-1)


def _frequency(pair: int, config: ModelConfig) -> float:
    """One pair's, as Llama 3.1's reference code says it: by wavelength, in three cases."""
    frequency = config.rope_theta ** (-2 * pair / config.head_size)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    old = scaling.original_max_seq_len
    if scaling.kind == "linear" or wavelength > old / scaling.low_freq_factor:
        return frequency / scaling.factor
    if wavelength < old / scaling.high_freq_factor:
        return frequency
    smooth = (old / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency

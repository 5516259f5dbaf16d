"""Grouped-query attention with rotary positions, and the key-value cache for decoding.

Letters: B batch, L sequence, D model, H query heads, G key-value heads, C channels of a head, M cache length.
"""

import math
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modules.config import ModelConfig
from modules.errors import InputError
from modules.functional.attention import attend
from modules.layers.norm import RMSNorm
from modules.layers.packed import PackedRows
from modules.layers.precision import to_compute


def rotary_angles(position_ids_BL: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, 1, L, C] of the rotary embedding, half-split layout (RoFormer, arXiv 2104.09864)."""
    frequencies = rotary_frequencies(config).to(position_ids_BL.device)
    angle_BLC = position_ids_BL[..., None].double() * frequencies
    angle = torch.cat((angle_BLC, angle_BLC), dim=-1)[:, None]
    return angle.cos(), angle.sin()


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """What each pair of channels turns by from one position to the next, in radians: float64 [C / 2]."""
    exponent = torch.arange(0, config.head_size, 2, dtype=torch.float64) / config.head_size
    frequencies = config.rope_theta**-exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    waves = scaling.original_max_seq_len * frequencies / (2 * math.pi)  # in the context before
    kept = ((waves - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of channels (c, c + C/2) of [B, H, L, C] by the position's angle."""
    return _Rotation.apply(heads, cos.to(heads.dtype), sin.to(heads.dtype))


class _Rotation(torch.autograd.Function):
    """Its gradient is turned back by the same angle: half as many passes as through the operations of `_turned`."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(heads, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, -sin), None, None


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = heads * cos
    for half, other, sine in zip(turned.chunk(2, -1), reversed(heads.chunk(2, -1)), (-sin, sin), strict=True):
        half.addcmul_(other, sine.chunk(2, -1)[0])
    return turned


class KVCache:
    """Keys and values of the tokens seen so far, for every layer.

    Args:
        start_B: for prompts padded on the left, the index of each row's first real token: earlier keys are masked and
            positions count from it.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        start_B: Tensor | None = None,
    ) -> None:
        if max_len > config.max_seq_len:
            raise InputError(
                f"{max_len} tokens (prompt and continuation) are more than max_seq_len={config.max_seq_len}; "
                "shorten the prompt or max_new_tokens"
            )
        self.num_layers, self.max_len, self.dtype = config.num_layers, max_len, dtype
        self.store: Tensor | None = None  # as many heads as keys come with: this process may have some of them
        self.start_B = torch.zeros(batch_size, dtype=torch.long, device=device) if start_B is None else start_B
        self.length = 0

    def positions_and_mask(self, num_new: int) -> tuple[Tensor, Tensor]:
        """Positions [B, L] of the next tokens, and which keys each of them sees [B, 1, L, length + L]."""
        end = self.length + num_new
        query_L = torch.arange(self.length, end, device=self.start_B.device)
        key_M = torch.arange(end, device=self.start_B.device)
        positions_BL = (query_L - self.start_B[:, None]).clamp_min(0)
        seen = (key_M <= query_L[:, None]) & (key_M >= self.start_B[:, None, None])
        own = key_M == query_L[:, None]  # a padding row sees itself, so that its softmax has an entry
        return positions_BL, (seen | own)[:, None]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, G, L, C] of one layer; returns all of that layer so far."""
        end = self.length + keys.shape[2]
        if self.store is None:
            rows, heads, _, channels = keys.shape
            shape = (self.num_layers, 2, rows, heads, self.max_len, channels)
            self.store = torch.zeros(shape, device=keys.device, dtype=self.dtype)
        self.store[layer, 0, :, :, self.length : end] = keys
        self.store[layer, 1, :, :, self.length : end] = values
        return self.store[layer, 0, :, :, :end], self.store[layer, 1, :, :, :end]

    def select(self, rows: Tensor) -> "KVCache":
        """The same cache with only these rows of the batch."""
        chosen = copy(self)
        chosen.store = None if self.store is None else self.store[:, :, rows]
        chosen.start_B = self.start_B[rows]
        return chosen

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of new queries [B, H, L, C] over all keys so far, the new ones among them."""
        key, value = self.append(layer, key, value)
        return attend(query, key.to(query.dtype), value.to(query.dtype), mask)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_size
        query_dim = config.num_heads * config.head_size
        key_dim = config.kv_heads * config.head_size
        self.q_proj = nn.Linear(config.dim, query_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, key_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, key_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_dim, config.dim, bias=config.o_bias)
        self.norms_heads = config.qk_norm_scope == "head"
        self.q_norm = self._norm(config, query_dim)
        self.k_norm = self._norm(config, key_dim)

    def forward(
        self,
        hidden_BLD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        layer: int,
        cache: KVCache | PackedRows | None = None,
    ) -> Tensor:
        """Mix positions: [B, L, D] to [B, L, D]. `mask` is True where a query sees a key; None means causal."""
        hidden_BLD = to_compute(hidden_BLD)
        query = rotate(self._normed(self.q_norm, self.q_proj(hidden_BLD)), *rotary)
        key = rotate(self._normed(self.k_norm, self.k_proj(hidden_BLD)), *rotary)
        value = self._split(self.v_proj(hidden_BLD))
        if cache is None:
            mixed = attend(query, key.to(query.dtype), value.to(query.dtype), mask)
        else:
            mixed = cache.attend(layer, query, key, value, mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    @staticmethod
    def _norm(config: ModelConfig, projected_dim: int) -> nn.Module:
        if not config.qk_norm:
            return nn.Identity()
        return RMSNorm(config.head_size if config.qk_norm_scope == "head" else projected_dim, eps=config.norm_eps)

    def _normed(self, norm: nn.Module, flat: Tensor) -> Tensor:
        return norm(self._split(flat)) if self.norms_heads else self._split(norm(flat))

    def _split(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

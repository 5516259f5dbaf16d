"""The decoder: embedding, blocks of attention and feed-forward, final norm, output head.

Letters: B batch, L sequence, D model, V vocabulary.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from modules.config import ModelConfig
from modules.errors import InputError
from modules.functional.routing import RoutingStats
from modules.layers.attention import Attention, KVCache, rotary_angles
from modules.layers.experts import RoutedExperts
from modules.layers.feedforward import FeedForward
from modules.layers.norm import RMSNorm
from modules.layers.output import LocalOutput, Output
from modules.layers.packed import PackedRows
from modules.world import ONE_PROCESS, fill

_INTO_RESIDUAL = ("o_proj.weight", "down.weight", "experts.down")


class Block(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x), dense or routed by the layer's number.

    With hybridnorm what a branch writes has a norm of its own: x + norm(attention(norm x)), and so on. With postnorm
    that is the only one: x + norm(attention(x)).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = _norm(config, config.norm_structure != "postnorm")
        self.attention = Attention(config)
        self.attention_post_norm = _norm(config, config.norm_structure != "prenorm")
        self.feed_forward_norm = _norm(config, config.norm_structure != "postnorm")
        routed = layer in config.routed_layers
        self.feed_forward = RoutedExperts(config) if routed else FeedForward(config.dim, config.ffn_size)
        self.feed_forward_post_norm = _norm(config, config.norm_structure != "prenorm")

    def forward(
        self,
        hidden_BLD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | PackedRows | None,
        decoding: bool,
    ) -> tuple[Tensor, RoutingStats | None]:
        """The block's output and, for a routed layer, what its router did."""
        mixed_BLD = self.attention(self.attention_norm(hidden_BLD), rotary, mask, self.layer, cache)
        hidden_BLD = hidden_BLD + self.attention_post_norm(mixed_BLD)
        update_BLD, stats = self.feed_forward(self.feed_forward_norm(hidden_BLD), decoding)
        return hidden_BLD + self.feed_forward_post_norm(update_BLD), stats


class Transformer(nn.Module):
    """A decoder language model of the shape that `config` gives, with freshly drawn weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.output: Output = LocalOutput()
        if not self.embedding.weight.is_meta:
            fill(ONE_PROCESS, self, self.initial_values())

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix [V, D]; the embedding's when they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def initial_values(self) -> Iterator[tuple[str, Tensor]]:
        """Fresh values for all parameters and buffers, one after the other, on the CPU, whatever the network is on.

        Drawn from N(0, init_std); those that write into the residual stream from it / sqrt(2 layers).
        """
        std = self.config.init_std
        into_residual = std / math.sqrt(2 * self.config.num_layers)
        for name, tensor in self.state_dict().items():
            value = torch.zeros(tensor.shape, dtype=tensor.dtype)
            if tensor.ndim >= 2:
                value.normal_(std=into_residual if name.endswith(_INTO_RESIDUAL) else std)
            elif name.endswith(".weight"):
                value.fill_(1.0)
            yield name, value

    def forward(
        self,
        tokens_BL: Tensor,
        *,
        position_ids_BL: Tensor | None = None,
        document_ids_BL: Tensor | None = None,
        cache: KVCache | PackedRows | None = None,
        decoding: bool = False,
    ) -> tuple[Tensor, list[RoutingStats]]:
        """Hidden states after the final norm [B, L, D], and the stats of each routed layer.

        Args:
            tokens_BL: token ids.
            position_ids_BL: rotary positions; counted from 0 when left out.
            document_ids_BL: attention stays inside equal ids (and causal); one document when left out.
            cache: append to this cache and attend to what it holds, or keep packed rows apart; positions then come
                from it.
            decoding: no token's output may depend on later tokens or on other rows, as it does through the capacity of
                experts: none is dropped. A cache implies it.

        Raises:
            InputError: more tokens than `config.max_seq_len`; expert choice while decoding.
        """
        length = tokens_BL.shape[1]
        if length > self.config.max_seq_len and not isinstance(cache, PackedRows):
            raise InputError(
                f"sequence of {length} tokens is longer than max_seq_len={self.config.max_seq_len}; "
                "shorten it (data.seq_len) or raise model.architecture.max_seq_len"
            )
        mask: Tensor | None
        if cache is not None:
            position_ids_BL, mask = cache.positions_and_mask(length)
        else:
            mask = document_mask(document_ids_BL) if document_ids_BL is not None else None
        if position_ids_BL is None:
            position_ids_BL = torch.arange(length, device=tokens_BL.device)[None]
        hidden_BLD = self.embedding(tokens_BL)
        cos, sin = rotary_angles(position_ids_BL, self.config)
        rotary = (cos.to(hidden_BLD.dtype), sin.to(hidden_BLD.dtype))
        stats = []
        for block in self.blocks:
            hidden_BLD, layer_stats = block(hidden_BLD, rotary, mask, cache, decoding or cache is not None)
            if layer_stats is not None:
                stats.append(layer_stats)
        if cache is not None:
            cache.length += length
        return self.final_norm(hidden_BLD), stats

    def routed_layers(self) -> list[RoutedExperts]:
        """The routed feed-forward layers, from the first to the last."""
        return [block.feed_forward for block in self.blocks if isinstance(block.feed_forward, RoutedExperts)]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary [..., V] of final hidden states [..., D]."""
        return self.output.logits(hidden, self.head_weight)

    def cross_entropy(self, hidden_TD: Tensor, targets_T: Tensor, chunk_rows: int = 1024) -> tuple[Tensor, Tensor]:
        """The sum of the targets' losses in nats, and each loss (detached), of final hidden states.

        Args:
            targets_T: target ids; `losses.IGNORE_INDEX` counts for nothing.
            chunk_rows: rows whose logits exist at one time.
        """
        return self.output.cross_entropy(hidden_TD, self.head_weight, targets_T, chunk_rows)


def _norm(config: ModelConfig, present: bool) -> nn.Module:
    return RMSNorm(config.dim, eps=config.norm_eps) if present else nn.Identity()


def document_mask(document_ids_BL: Tensor) -> Tensor:
    """True [B, 1, L, L] where a query and an earlier or equal key lie in one document."""
    length = document_ids_BL.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids_BL.device).tril()
    same = document_ids_BL[:, :, None] == document_ids_BL[:, None, :]
    return (same & causal)[:, None]

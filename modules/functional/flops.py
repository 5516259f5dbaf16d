"""Parameters and floating-point operations of an architecture, counted from its configuration."""

from dataclasses import dataclass

from modules.config import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model; `active` are those that one token meets (K of E experts)."""

    total: int
    active: int
    non_embedding: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count parameters without building the model. `non_embedding` leaves out embedding and output head."""
    attention = _attention_parameters(config)
    dense_ffn = 3 * config.dim * config.ffn_size
    expert = 3 * config.dim * config.expert_size
    num_routed = len(config.routed_layers)
    num_dense = config.num_layers - num_routed
    router = config.dim * config.moe.num_experts if config.moe else 0
    total_routed = num_routed * (router + (expert * config.moe.num_experts if config.moe else 0))
    active_routed = num_routed * (router + (expert * config.moe.top_k if config.moe else 0))
    shared = config.num_layers * (attention + 2 * config.dim) + num_dense * dense_ffn + config.dim
    embeddings = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    return ParameterCount(
        total=shared + total_routed + embeddings,
        active=shared + active_routed + embeddings,
        non_embedding=shared + total_routed,
    )


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward FLOPs of one token: 6 per active weight in a product, and causal attention's scores.

    Counts multiply and add as two, attention over half the square (causal), and no recomputation
    (PaLM, arXiv 2204.02311, appendix B, with the embedding lookup left out).
    """
    count = count_parameters(config)
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.dim
    gains = config.dim * (2 * config.num_layers + 1)
    scores = 6 * config.num_layers * config.num_heads * config.head_size * seq_len
    return 6.0 * (count.active - lookup - gains) + scores


def _attention_parameters(config: ModelConfig) -> int:
    query = config.num_heads * config.head_size
    key_value = config.kv_heads * config.head_size
    weights = config.dim * (2 * query + 2 * key_value)
    biases = query + 2 * key_value if config.qkv_bias else 0
    norms = 2 * config.head_size if config.qk_norm else 0
    return weights + biases + norms

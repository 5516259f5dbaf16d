"""Parameters and floating-point operations of an architecture, counted from its configuration."""

from dataclasses import dataclass

from modules.config import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model; `active` are those that one token meets (K of E experts)."""

    total: int
    active: int
    non_embedding: int

    @property
    def active_non_embedding(self) -> int:
        """Those of the active ones that are not in embedding and output head."""
        return self.active - (self.total - self.non_embedding)


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count parameters without building the model. `non_embedding` leaves out embedding and output head."""
    num_routed = len(config.routed_layers)
    num_dense = config.num_layers - num_routed
    norms = _norms_per_layer(config) * config.num_layers + 1
    always = config.num_layers * _attention_parameters(config) + norms * config.dim
    always += num_dense * 3 * config.dim * config.ffn_size
    routed = active_routed = 0
    if config.moe is not None:
        expert, shared = 3 * config.dim * config.expert_size, 3 * config.dim * config.shared_size
        router = config.dim * (config.moe.num_experts + config.moe.shared_gate)
        routed = num_routed * (router + shared + expert * config.moe.num_experts)
        active_routed = num_routed * (router + shared + expert * config.moe.top_k)
    embeddings = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    return ParameterCount(
        total=always + routed + embeddings,
        active=always + active_routed + embeddings,
        non_embedding=always + routed,
    )


def expert_rows_per_token(config: ModelConfig, seq_len: int) -> float:
    """Rows that experts work on for each token in training: top_k, or all slots of a capacity, the empty ones too."""
    moe = config.moe
    if moe is None:
        return 0.0
    if moe.capacity is None:
        return float(moe.top_k)
    group_size = moe.capacity.group_size or seq_len
    return moe.num_experts * moe.capacity.slots(group_size, moe.num_experts) / group_size


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward FLOPs of one token: 6 per active weight in a product, and causal attention's scores.

    Counts multiply and add as two, attention over half the square (causal), empty slots of experts with a capacity, and
    no recomputation (PaLM, arXiv 2204.02311, appendix B, with the embedding lookup left out).
    """
    count = count_parameters(config)
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.dim
    gains = config.dim * (_norms_per_layer(config) * config.num_layers + 1)
    weights = count.active - lookup - gains
    if config.moe is not None:
        empty_slots = expert_rows_per_token(config, seq_len) - config.moe.top_k
        weights += round(len(config.routed_layers) * empty_slots * 3 * config.dim * config.expert_size)
    scores = 6 * config.num_layers * config.num_heads * config.head_size * seq_len
    return 6.0 * weights + scores


def _norms_per_layer(config: ModelConfig) -> int:
    return 4 if config.norm_structure == "hybridnorm" else 2


def _attention_parameters(config: ModelConfig) -> int:
    query = config.num_heads * config.head_size
    key_value = config.kv_heads * config.head_size
    weights = config.dim * (2 * query + 2 * key_value)
    biases = query + 2 * key_value if config.qkv_bias else 0
    biases += config.dim if config.o_bias else 0
    norms = 2 * config.head_size if config.qk_norm_scope == "head" else query + key_value
    return weights + biases + (norms if config.qk_norm else 0)

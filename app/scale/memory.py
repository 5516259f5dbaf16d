"""Bytes that one rank holds: its parts of the model, which are exact, and what a step needs beside them, an estimate.

Activations are what autograd keeps from forward to backward, counted tensor by tensor from the layers' code, for fused
attention (no scores are kept). `tests/unit/test_plan_memory.py` holds them against what autograd keeps on a CPU.

Letters: T tokens of a micro-batch, D model, H·C channels of queries, G·C of keys, F feed-forward hidden, V vocabulary,
R rows of experts, E experts.
"""

from collections import Counter
from dataclasses import dataclass

from app.scale.shards import Shards, Unit
from app.scale.workload import Workload


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        parameters, gradients, optimizer: exact; gradients that accumulate over micro-batches are not shared out.
        gathered: estimate: weights and gradients of the blocks at work, and of the whole root, outside of their shards.
        activations: estimate.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.gathered + self.activations


def rank_memory(work: Workload, shards: Shards) -> Memory:
    """Bytes of the rank whose shards are given."""
    number = work.parameter_bytes
    moments = 2 * shards.numel - (shards.muon_numel if work.is_muon else 0)
    gradients = shards.numel * number
    if work.accumulate > 1:
        gradients += sum(unit.count * _gathered(unit) for unit in shards.units) * number
    return Memory(
        parameters=shards.numel * number,
        gradients=gradients,
        optimizer=moments * number,
        gathered=_gathered_bytes(work, shards),
        activations=activation_bytes(work),
    )


def activation_bytes(work: Workload) -> int:
    """What one micro-batch keeps for its backward pass, and the largest piece of work beside it.

    That is one chunk of logits, or one block that is computed again.
    """
    config = work.config
    words = _words(work)
    chunk = min(work.loss_chunk_rows, work.tokens) * words * (work.compute_bytes + 2 * work.wide_bytes)
    if work.wrapping.activation_checkpointing != "full":
        return kept_bytes(work) + chunk
    kinds = {layer in config.routed_layers for layer in range(config.num_layers)}
    return kept_bytes(work) + max(chunk, *(_block(work, is_routed) for is_routed in kinds))


def kept_bytes(work: Workload) -> int:
    """What autograd keeps of one micro-batch from forward to backward.

    For each block, in numbers per token of `parameter_bytes` w or `compute_bytes` c:
        attention: D w of its norm + D c of the input + (2 H·C + 2 G·C) c / tp
        feed-forward: D w + D c + 4 F c / tp
        routed: 2 D w, the router's input too, + 2 E of float32 + R/T (2 D + 4 F / tp) c, and shared experts as above
        and, under autocast, all of its weights in c: their casts are kept like any other input of a product. Weights
        that are gathered in bfloat16 need no cast; they are dropped and gathered again.
    Recomputation `full` keeps D w of each block instead; `selective` keeps 2 D w of attention.
    Behind the blocks: D w of the norm, and the gradients that the loss forms in forward: T D c and V D of float32 / tp.
    """
    config, narrow = work.config, work.compute_bytes
    if work.wrapping.activation_checkpointing == "full":
        blocks = config.num_layers * work.tokens * config.dim * work.parameter_bytes
    else:
        num_routed = len(config.routed_layers)
        blocks = num_routed * _block(work, True) if num_routed else 0
        blocks += (config.num_layers - num_routed) * _block(work, False)
    ends = work.tokens * config.dim * (work.parameter_bytes + narrow)
    return blocks + ends + _words(work) * config.dim * work.wide_bytes


def _words(work: Workload) -> int:
    tp, words = work.layout.tp, work.config.vocab_size
    return words if words % tp else words // tp


def cast_bytes(work: Workload) -> int:
    """Of `kept_bytes`, the casts of weights."""
    config = work.config
    if work.wrapping.activation_checkpointing == "full" or not _are_weights_cast(work):
        return 0
    num_routed = len(config.routed_layers)
    numel = (config.num_layers - num_routed) * _weights(work, False)
    numel += num_routed * _weights(work, True) if num_routed else 0
    return numel * work.compute_bytes


def _block(work: Workload, is_routed: bool) -> int:
    """Bytes that a block keeps, with nothing computed again or its attention."""
    config, wide, narrow, tp = work.config, work.parameter_bytes, work.compute_bytes, work.layout.tp
    per_token = config.dim * (wide + narrow)
    per_token += 2 * (config.num_heads + config.kv_heads) * config.head_size * narrow // tp
    if work.wrapping.activation_checkpointing == "selective":
        per_token = 2 * config.dim * wide
    if is_routed:
        assert config.moe is not None
        rows = work.expert_rows / work.tokens
        per_token += 2 * config.dim * wide + 2 * 4 * config.moe.num_experts
        per_token += round(rows * (2 * config.dim + 4 * config.expert_size / tp) * narrow)
        per_token += bool(config.shared_size) * config.dim * narrow + 4 * config.shared_size * narrow // tp
    else:
        per_token += config.dim * (wide + narrow) + 4 * config.ffn_size * narrow // tp
    return work.tokens * per_token + (_weights(work, is_routed) * narrow if _are_weights_cast(work) else 0)


def _are_weights_cast(work: Workload) -> bool:
    """Autocast rounds weights that were gathered as they are."""
    return work.compute_bytes != work.parameter_bytes and work.wrapping.gathers == "float32"


def _weights(work: Workload, is_routed: bool) -> int:
    """Weights in a block's products on one rank, but for attention that is computed again."""
    config, layout = work.config, work.layout
    query, key = config.num_heads * config.head_size, config.kv_heads * config.head_size
    numel = config.dim * 2 * (query + key)
    if work.wrapping.activation_checkpointing == "selective":
        numel = 0
    if not is_routed:
        return (numel + 3 * config.dim * config.ffn_size) // layout.tp
    assert config.moe is not None
    experts = config.moe.num_experts // layout.ep * config.expert_size
    return (numel + 3 * config.dim * (experts + config.shared_size)) // layout.tp


def _gathered(unit: Unit) -> int:
    """Numbers of a unit's parameters when they are gathered."""
    return unit.sharers * unit.numel


def _gathered_bytes(work: Workload, shards: Shards) -> int:
    """The root's weights and gradients; a block's weights, those of the next one, which come ahead, and its gradients.

    Where weights are kept after forward, those of all blocks.
    """
    weights: Counter[str] = Counter()
    gradients: Counter[str] = Counter()
    kept = 0
    for unit in shards.units:
        weights[unit.place] += _gathered(unit) * work.gathered_bytes(unit.is_rounded)
        gradients[unit.place] += _gathered(unit) * work.parameter_bytes
        kept += (unit.place != "root") * unit.count * _gathered(unit) * work.gathered_bytes(unit.is_rounded)
    root = weights.pop("root") + gradients.pop("root")
    if work.wrapping.reshard_after_forward:
        kept = 2 * max(weights.values())
    return root + kept + max(gradients.values())

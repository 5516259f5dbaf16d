"""The weights of one of our networks under the names of each library.

Letters: D model, F hidden width, H heads, C channels of a head.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.layer_weights import Weights, hf_names, litgpt_names, titan_names
from modules.layers.experts import RoutedExperts
from modules.layers.feedforward import FeedForward
from modules.layers.transformer import Block, Transformer

Named = dict[str, Tensor]


def hf_weights(source: Transformer) -> Named:
    """For transformers' Mistral and Mixtral."""
    weights = ends(source, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    for prefix, block in numbered(source, "model.layers"):
        projections = {f"self_attn.{name}.weight": weight for name, weight in attention(block).items()}
        weights |= prefixed(prefix, norms(block, "input_layernorm", "post_attention_layernorm") | projections)
        if isinstance(block.feed_forward, RoutedExperts):
            weights |= prefixed(f"{prefix}mlp.", hf_names(routed_weights(block.feed_forward)))
        else:
            weights |= prefixed(f"{prefix}mlp.", dense_weights(block, "gate_proj", "up_proj", "down_proj"))
    return weights


def litgpt_weights(source: Transformer) -> Named:
    """For litgpt's GPT; queries, keys and values are one matrix, one after the other."""
    weights = ends(source, "transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight")
    for prefix, block in numbered(source, "transformer.h"):
        parts = attention(block)
        fused = torch.cat((parts["q_proj"], parts["k_proj"], parts["v_proj"]))
        projections = {"attn.qkv.weight": fused, "attn.proj.weight": parts["o_proj"]}
        weights |= prefixed(prefix, norms(block, "norm_1", "norm_2") | projections)
        if isinstance(block.feed_forward, RoutedExperts):
            weights |= prefixed(f"{prefix}mlp.", litgpt_names(routed_weights(block.feed_forward)))
        else:
            weights |= prefixed(f"{prefix}mlp.", dense_weights(block, "fc_1", "fc_2", "proj"))
    return weights


def titan_weights(source: Transformer) -> Named:
    """For torchtitan's Qwen3 decoder; queries, keys and values are one matrix, head by head."""
    weights = ends(source, "tok_embeddings.weight", "norm.weight", "lm_head.weight")
    heads = source.config.num_heads
    for prefix, block in numbered(source, "layers"):
        parts = attention(block)
        by_head_HCD = [parts[name].unflatten(0, (heads, -1)) for name in ("q_proj", "k_proj", "v_proj")]
        fused = torch.stack(by_head_HCD, dim=1).flatten(0, 2)
        projections = {"attention.qkv_linear.wqkv.weight": fused, "attention.wo.weight": parts["o_proj"]}
        weights |= prefixed(prefix, norms(block, "attention_norm", "ffn_norm") | projections)
        if isinstance(block.feed_forward, RoutedExperts):
            weights |= prefixed(f"{prefix}moe.", titan_names(routed_weights(block.feed_forward)))
        else:
            weights |= prefixed(f"{prefix}feed_forward.", dense_weights(block, "w1", "w3", "w2"))
    return weights


def numbered(source: Transformer, name: str) -> Iterator[tuple[str, Block]]:
    """Blocks with the prefix of their names."""
    for number, block in enumerate(source.blocks):
        assert isinstance(block, Block)
        yield f"{name}.{number}.", block


def prefixed(prefix: str, weights: Named) -> Named:
    """The same weights, further down a tree of modules."""
    return {prefix + name: weight for name, weight in weights.items()}


def ends(source: Transformer, embedding: str, norm: str, head: str) -> Named:
    """What is not in a block."""
    return {embedding: source.embedding.weight, norm: source.final_norm.weight, head: source.head_weight}


def norms(block: Block, first: str, second: str) -> Named:
    """Before attention, and before the feed-forward."""
    return {f"{first}.weight": block.attention_norm.weight, f"{second}.weight": block.feed_forward_norm.weight}


def attention(block: Block) -> Named:
    """The four projections."""
    return {name: getattr(block.attention, name).weight for name in ("q_proj", "k_proj", "v_proj", "o_proj")}


def dense_weights(block: Block, gate: str, up: str, down: str) -> Named:
    """A dense feed-forward."""
    layer = block.feed_forward
    assert isinstance(layer, FeedForward)
    pairs = ((gate, layer.gate), (up, layer.up), (down, layer.down))
    return {f"{name}.weight": linear.weight for name, linear in pairs}


def routed_weights(layer: RoutedExperts) -> Weights:
    """A routed one, each expert as `nn.Linear` would store it."""
    experts = layer.experts
    return Weights(layer.router.weight, experts.gate.mT, experts.up.mT, experts.down.mT)

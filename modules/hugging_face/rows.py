"""The tensors of model families under both names: tables.

Letters: V vocabulary, D model, Q query channels of all heads, G key channels of all heads, C channels of a head,
F hidden width of a dense feed-forward, E experts, X hidden width of an expert, S hidden width of shared experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from modules.config import ModelConfig

Part = Literal["gate", "up", "down"]
Zeros = Callable[[ModelConfig], bool]


@dataclass(frozen=True)
class Row:
    """One tensor of a layer, or of the model, under both names.

    Attributes:
        ours: name in `Transformer.state_dict()`, below `blocks.N.` for a tensor of a layer.
        theirs: name in the family's files, below `model.layers.N.`; of stacked experts with `{expert}` in it.
        shape: letters of the dimensions, ours; an expert's matrix of theirs is ours transposed.
        needs: the feature that a model (or layer) must have for ours to be there; empty: always.
        zeros: when theirs is there although ours is not: it is zero then.
        part: for the matrices of experts, which one it is.
        idle: where ours is not there, what theirs holds has no effect.
        where: the feature that a layer must have for either to be there; empty: any.
    """

    ours: str
    theirs: str
    shape: str
    needs: str = ""
    zeros: Zeros | None = None
    part: Part | None = None
    idle: bool = False
    where: str = ""


FIRST_ROWS = (Row("embedding.weight", "model.embed_tokens.weight", "VD"),)
LAST_ROWS = (
    Row("final_norm.weight", "model.norm.weight", "D"),
    Row("head.weight", "lm_head.weight", "VD", "untied"),
)


def attention(zero_qkv: Zeros | None = None, zero_o: Zeros | None = None, norm_shapes: str = "") -> tuple[Row, ...]:
    """Attention's tensors.

    Args:
        zero_qkv: when a family has biases on q, k and v that ours lacks.
        zero_o: when it has one on o that ours lacks.
        norm_shapes: letters of the norms on q and k, for families that have some.
    """
    rows = [
        row
        for part, channels in (("q_proj", "Q"), ("k_proj", "G"), ("v_proj", "G"))
        for row in (
            Row(f"attention.{part}.weight", f"self_attn.{part}.weight", f"{channels}D"),
            Row(f"attention.{part}.bias", f"self_attn.{part}.bias", channels, "qkv_bias", zero_qkv),
        )
    ]
    rows += [
        Row("attention.o_proj.weight", "self_attn.o_proj.weight", "DQ"),
        Row("attention.o_proj.bias", "self_attn.o_proj.bias", "D", "o_bias", zero_o),
    ]
    for part, channels in zip(("q_norm", "k_norm"), norm_shapes, strict=False):
        rows.append(Row(f"attention.{part}.weight", f"self_attn.{part}.weight", channels, "qk_norm"))
    return tuple(rows)


DENSE = (
    Row("feed_forward.gate.weight", "mlp.gate_proj.weight", "FD", "dense"),
    Row("feed_forward.up.weight", "mlp.up_proj.weight", "FD", "dense"),
    Row("feed_forward.down.weight", "mlp.down_proj.weight", "DF", "dense"),
)


def experts(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """A router and its experts, with the family's names of the three matrices."""
    inside = f"{block}.experts.{{expert}}"
    return (
        Row("feed_forward.router.weight", f"{block}.gate.weight", "ED", "routed"),
        Row("feed_forward.experts.gate", f"{inside}.{gate}.weight", "EDX", "routed", part="gate"),
        Row("feed_forward.experts.up", f"{inside}.{up}.weight", "EDX", "routed", part="up"),
        Row("feed_forward.experts.down", f"{inside}.{down}.weight", "EXD", "routed", part="down"),
    )


QWEN_EXPERTS = experts("mlp", "gate_proj", "up_proj", "down_proj")
MIXTRAL_EXPERTS = experts("block_sparse_moe", "w1", "w3", "w2")
SHARED = (
    Row("feed_forward.shared.gate.weight", "mlp.shared_expert.gate_proj.weight", "SD", "shared"),
    Row("feed_forward.shared.up.weight", "mlp.shared_expert.up_proj.weight", "SD", "shared"),
    Row("feed_forward.shared.down.weight", "mlp.shared_expert.down_proj.weight", "DS", "shared"),
    Row(
        "feed_forward.shared_gate.weight",
        "mlp.shared_expert_gate.weight",
        "1D",
        "shared",
        zeros=lambda config: not config.shared_size,  # vLLM reads a gate also where there is no shared expert
        idle=True,
        where="routed",
    ),
)


def prenorm(attention: tuple[Row, ...], feed_forward: tuple[Row, ...]) -> tuple[Row, ...]:
    """A layer that normalises what its branches read."""
    return (
        Row("attention_norm.weight", "input_layernorm.weight", "D"),
        *attention,
        Row("feed_forward_norm.weight", "post_attention_layernorm.weight", "D"),
        *feed_forward,
    )


def postnorm(attention: tuple[Row, ...], feed_forward: tuple[Row, ...]) -> tuple[Row, ...]:
    """A layer that normalises what its branches write."""
    return (
        *attention,
        Row("attention_post_norm.weight", "post_attention_layernorm.weight", "D"),
        *feed_forward,
        Row("feed_forward_post_norm.weight", "post_feedforward_layernorm.weight", "D"),
    )

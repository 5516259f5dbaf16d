"""What each axis of each parameter stands for. Every growth method works from this one table and names no layer.

A residual *writer* adds to the residual stream, a *reader* takes its input from it (but for postnorm, through a norm).
So it is with the hidden neurons of a feed-forward and for attention heads: their producers have an OUT axis, their
consumers an IN axis.
"""

import re
from dataclasses import dataclass
from enum import Enum, auto


class Axis(Enum):
    """The role of one axis of a parameter."""

    VOCABULARY = auto()
    RESIDUAL_OUT = auto()
    RESIDUAL_IN = auto()
    HEAD_IN = auto()
    NORM_GAIN = auto()
    POST_GAIN = auto()
    FINAL_GAIN = auto()
    HIDDEN_OUT = auto()
    HIDDEN_IN = auto()
    EXPERT_HIDDEN_OUT = auto()
    EXPERT_HIDDEN_IN = auto()
    SHARED_HIDDEN_OUT = auto()
    SHARED_HIDDEN_IN = auto()
    HEADS_OUT = auto()
    HEADS_IN = auto()
    KEY_HEADS_OUT = auto()
    VALUE_HEADS_OUT = auto()
    QUERY_GAIN = auto()
    KEY_GAIN = auto()
    EXPERT = auto()
    UNIT = auto()


IN_AXES = frozenset(
    {
        Axis.RESIDUAL_IN,
        Axis.HEAD_IN,
        Axis.HIDDEN_IN,
        Axis.EXPERT_HIDDEN_IN,
        Axis.SHARED_HIDDEN_IN,
        Axis.HEADS_IN,
    }
)
"""Axes along which copies of one input are added up."""

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")

_MODEL_AXES: dict[str, tuple[Axis, ...]] = {
    "embedding.weight": (Axis.VOCABULARY, Axis.RESIDUAL_OUT),
    "final_norm.weight": (Axis.FINAL_GAIN,),
    "head.weight": (Axis.VOCABULARY, Axis.HEAD_IN),
}

_BLOCK_AXES: dict[str, tuple[Axis, ...]] = {
    "attention_norm.weight": (Axis.NORM_GAIN,),
    "attention.q_proj.weight": (Axis.HEADS_OUT, Axis.RESIDUAL_IN),
    "attention.q_proj.bias": (Axis.HEADS_OUT,),
    "attention.k_proj.weight": (Axis.KEY_HEADS_OUT, Axis.RESIDUAL_IN),
    "attention.k_proj.bias": (Axis.KEY_HEADS_OUT,),
    "attention.v_proj.weight": (Axis.VALUE_HEADS_OUT, Axis.RESIDUAL_IN),
    "attention.v_proj.bias": (Axis.VALUE_HEADS_OUT,),
    "attention.o_proj.weight": (Axis.RESIDUAL_OUT, Axis.HEADS_IN),
    "attention.o_proj.bias": (Axis.RESIDUAL_OUT,),
    "attention.q_norm.weight": (Axis.QUERY_GAIN,),
    "attention.k_norm.weight": (Axis.KEY_GAIN,),
    "attention_post_norm.weight": (Axis.POST_GAIN,),
    "feed_forward_norm.weight": (Axis.NORM_GAIN,),
    "feed_forward_post_norm.weight": (Axis.POST_GAIN,),
    "feed_forward.gate.weight": (Axis.HIDDEN_OUT, Axis.RESIDUAL_IN),
    "feed_forward.up.weight": (Axis.HIDDEN_OUT, Axis.RESIDUAL_IN),
    "feed_forward.down.weight": (Axis.RESIDUAL_OUT, Axis.HIDDEN_IN),
    "feed_forward.router.weight": (Axis.EXPERT, Axis.RESIDUAL_IN),
    "feed_forward.router.selection_bias_E": (Axis.EXPERT,),
    "feed_forward.shared_gate.weight": (Axis.UNIT, Axis.RESIDUAL_IN),
    "feed_forward.shared.gate.weight": (Axis.SHARED_HIDDEN_OUT, Axis.RESIDUAL_IN),
    "feed_forward.shared.up.weight": (Axis.SHARED_HIDDEN_OUT, Axis.RESIDUAL_IN),
    "feed_forward.shared.down.weight": (Axis.RESIDUAL_OUT, Axis.SHARED_HIDDEN_IN),
    "feed_forward.experts.gate": (Axis.EXPERT, Axis.RESIDUAL_IN, Axis.EXPERT_HIDDEN_OUT),
    "feed_forward.experts.up": (Axis.EXPERT, Axis.RESIDUAL_IN, Axis.EXPERT_HIDDEN_OUT),
    "feed_forward.experts.down": (Axis.EXPERT, Axis.EXPERT_HIDDEN_IN, Axis.RESIDUAL_OUT),
}


@dataclass(frozen=True)
class Role:
    """A parameter's (or buffer's) place: its block (None outside the blocks), its name inside it, and its axes."""

    layer: int | None
    part: str
    axes: tuple[Axis, ...]

    @property
    def writes_residual(self) -> bool:
        """True for the output projection of a block's branch."""
        return self.layer is not None and Axis.RESIDUAL_OUT in self.axes

    def at_layer(self, layer: int) -> str:
        """The name of the same parameter in another block."""
        return f"blocks.{layer}.{self.part}"


def role_of(name: str) -> Role:
    """The role of a parameter of `Transformer`, by its name in the state dict.

    Raises:
        KeyError: the table does not know the parameter.
    """
    match = _BLOCK.fullmatch(name)
    if match is None:
        return Role(None, name, _MODEL_AXES[name])
    return Role(int(match[1]), match[2], _BLOCK_AXES[match[2]])

"""What a model must be to be one of a family: the pieces that the families' lists are made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modules.config import ModelConfig
from modules.moe_config import MoEConfig


@dataclass(frozen=True)
class Requirement:
    """What a model must be to be one of a family.

    Attributes:
        needs: in words, for the message.
        holds: whether it is so; asked of dense models by dense families, and of routed ones by routed families.
        shown: the settings that decide it.
    """

    needs: str
    holds: Callable[[ModelConfig], bool]
    shown: tuple[str, ...]


def moe_of(config: ModelConfig) -> MoEConfig:
    """The routing of a model that has some."""
    assert config.moe is not None
    return config.moe


def _is(path: str, needs: str, holds: Callable[[Any], bool]) -> Requirement:
    return Requirement(needs, lambda config: holds(setting(config, path)), (path,))


def setting(config: ModelConfig, path: str) -> Any:
    """A field of the configuration by its dotted name."""
    found: Any = config
    for name in path.split("."):
        found = getattr(found, name)
    return found


PRENORM = _is("norm_structure", "norm_structure=prenorm", lambda structure: structure == "prenorm")
POSTNORM = _is("norm_structure", "norm_structure=postnorm", lambda structure: structure == "postnorm")
NO_NORM = _is("qk_norm", "qk_norm=false", lambda normed: not normed)
NO_QKV_BIAS = _is("qkv_bias", "qkv_bias=false", lambda biased: not biased)
QKV_BIAS = _is("qkv_bias", "qkv_bias=true", bool)
NO_O_BIAS = _is("o_bias", "o_bias=false", lambda biased: not biased)
O_WITH_QKV = Requirement("o_bias only with qkv_bias", lambda c: c.qkv_bias or not c.o_bias, ("qkv_bias", "o_bias"))
O_LIKE_QKV = Requirement("qkv_bias and o_bias alike", lambda c: c.qkv_bias == c.o_bias, ("qkv_bias", "o_bias"))
WHOLE_HEADS = Requirement("dim divisible by num_heads", lambda c: c.dim % c.num_heads == 0, ("dim", "num_heads"))
PLAIN_HEADS = Requirement(
    "head_dim=dim/num_heads", lambda c: c.head_size * c.num_heads == c.dim, ("dim", "num_heads", "head_size")
)


def normed(scope: str) -> Requirement:
    """Queries and keys are normalised, in this scope."""
    return Requirement(
        f"qk_norm=true with qk_norm_scope={scope}",
        lambda config: config.qk_norm and config.qk_norm_scope == scope,
        ("qk_norm", "qk_norm_scope"),
    )


SOFTMAX = (
    _is("moe.router.kind", "router.kind=top_k (or gshard)", lambda kind: kind != "expert_choice"),
    _is("moe.router.score", "router.score=softmax", lambda score: score != "sigmoid"),
    _is("moe.router.bias_update_rate", "router.bias_update_rate=0 (no selection bias)", lambda rate: rate == 0),
    _is("moe.router.soft_cap", "router.soft_cap left out", lambda cap: cap is None),
    _is("moe.router.gate_scale", "router.gate_scale=1", lambda scale: scale == 1),
    Requirement(
        "all groups of experts open",
        lambda c: moe_of(c).router.top_groups == moe_of(c).router.expert_groups,
        ("moe.router.expert_groups", "moe.router.top_groups"),
    ),
)
RENORMALISED = _is("moe.renormalize", "renormalize=true", bool)
NO_SHARED = _is("moe.num_shared_experts", "num_shared_experts=0", lambda number: number == 0)
GATED_SHARED = Requirement(
    "shared experts only with shared_gate=true",
    lambda c: moe_of(c).num_shared_experts == 0 or moe_of(c).shared_gate,
    ("moe.num_shared_experts", "moe.shared_gate"),
)
ALL_ROUTED = Requirement(
    "every layer routed", lambda c: len(c.routed_layers) == c.num_layers, ("num_layers", "routed_layers")
)
OLMOE_ROUTING = (*SOFTMAX, NO_SHARED, ALL_ROUTED)
MIXTRAL_ROUTING = (*OLMOE_ROUTING, RENORMALISED)

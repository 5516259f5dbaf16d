"""The shape of a model: frozen dataclasses, checked when they are made.

Letters: D model, V vocabulary, H query heads, F feed-forward hidden.
Derived sizes are properties and never stored, so a grown configuration is one `dataclasses.replace`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from modules.errors import InputError, require_positive
from modules.moe_config import TRAINING_SETTINGS, MoEConfig

CHECKPOINT_KEY = "growmoe"
"""Where a checkpoint keeps what is needed to rebuild the network before its weights are loaded."""
MANIFEST = "manifest.json"
"""The file that makes a directory a checkpoint: it is written last, and names all others."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are lowered for contexts longer than those that the model was first trained on."""

    kind: Literal["llama3", "linear"] = "llama3"
    """linear: all frequencies / factor (arXiv 2306.15595); llama3: only those whose wave is long (Llama 3.1)"""
    factor: float = 8.0
    """what frequencies are divided by"""
    low_freq_factor: float = 1.0
    """llama3: a wave longer than original_max_seq_len / this is divided by the factor"""
    high_freq_factor: float = 4.0
    """llama3: a wave shorter than original_max_seq_len / this stays; in between, the two are blended"""
    original_max_seq_len: int = 8192
    """llama3: the context before"""

    def __post_init__(self) -> None:
        names = ("factor", "low_freq_factor", "high_freq_factor")
        numbers = {f"rope_scaling.{name}": float(getattr(self, name)) for name in names}
        require_positive(**numbers, **{"rope_scaling.original_max_seq_len": self.original_max_seq_len})
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                f"rope_scaling.high_freq_factor={self.high_freq_factor} must be more than "
                f"low_freq_factor={self.low_freq_factor}; Llama 3.1 has 4 and 1"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one decoder (Llama-shaped: RMSNorm, RoPE, grouped-query attention, SwiGLU)."""

    vocab_size: int
    """entries of the vocabulary (V); taken from the data"""
    dim: int = 144
    """width of the residual stream (D)"""
    num_layers: int = 4
    """blocks"""
    num_heads: int = 3
    """query heads (H)"""
    num_kv_heads: int | None = None
    """key and value heads (grouped-query attention); empty: as many as query heads"""
    head_dim: int | None = None
    """channels of one head; empty: dim / num_heads"""
    ffn_dim: int | None = None
    """hidden width of the dense feed-forward (F); empty: 8/3 dim rounded up to a multiple of 8"""
    max_seq_len: int = 2048
    """the longest sequence that the model accepts, in tokens"""
    rope_theta: float = 10000.0
    """base of the rotary position embedding"""
    rope_scaling: RopeScaling | None = None
    """lower frequencies for a longer context; empty: none"""
    norm_eps: float = 1e-5
    """epsilon of RMSNorm"""
    qkv_bias: bool = False
    """biases on the query, key and value projections"""
    o_bias: bool = False
    """a bias on the attention's output projection"""
    qk_norm: bool = False
    """RMSNorm on queries and keys"""
    qk_norm_scope: Literal["head", "projection"] = "head"
    """qk_norm normalises each head by itself (Qwen3), or all heads of a token together (OLMo 2, OLMoE)"""
    tie_embeddings: bool = False
    """one matrix for the embedding and the output head"""
    norm_structure: Literal["prenorm", "hybridnorm", "postnorm"] = "prenorm"
    """x + f(norm x), x + norm(f(norm x)) with a second norm on what each branch writes, or x + norm(f(x)) (OLMo 2)"""
    init_std: float = 0.02
    """standard deviation of the initial weights; projections into the residual stream get it / sqrt(2 num_layers)"""
    moe: MoEConfig | None = None
    """routed feed-forward layers; empty: every layer is dense"""

    def __post_init__(self) -> None:
        require_positive(
            vocab_size=self.vocab_size,
            dim=self.dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            max_seq_len=self.max_seq_len,
            rope_theta=float(self.rope_theta),
            norm_eps=float(self.norm_eps),
            init_std=float(self.init_std),
        )
        self._check_heads()
        require_positive(ffn_dim=self.ffn_size)
        if self.moe is not None:
            self._check_moe(self.moe)

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def ffn_size(self) -> int:
        """Hidden width of the dense feed-forward."""
        return 8 * math.ceil(self.dim / 3) if self.ffn_dim is None else self.ffn_dim

    @property
    def expert_size(self) -> int:
        """Hidden width of one expert."""
        return self.ffn_size if self.moe is None or self.moe.expert_dim is None else self.moe.expert_dim

    @property
    def shared_size(self) -> int:
        """Hidden width of all shared experts of a routed layer together; 0 without any."""
        if self.moe is None:
            return 0
        return self.moe.num_shared_experts * (self.moe.shared_expert_dim or self.expert_size)

    @property
    def looks_ahead(self) -> bool:
        """True when a token's output depends on later tokens: experts choose."""
        return self.moe is not None and self.moe.router.kind == "expert_choice"

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """The layers whose feed-forward is routed, counted from 0."""
        if self.moe is None:
            return ()
        if self.moe.layers is not None:
            return tuple(sorted(set(self.moe.layers)))
        return tuple(range(self.moe.every - 1, self.num_layers, self.moe.every))

    def trained_like(self, other: "ModelConfig") -> "ModelConfig":
        """This model with what may change of another when a run is resumed: the settings of the routing losses."""
        if self.moe is None or other.moe is None:
            return self
        return replace(self, moe=self.moe.trained_like(other.moe))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for checkpoints and logs; `from_dict` reads it back."""
        return asdict(self) | {"moe": None if self.moe is None else self.moe.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "ModelConfig":
        """The configuration that `to_dict` wrote."""
        moe, scaling = record.get("moe"), record.get("rope_scaling")
        parts = {
            "moe": None if moe is None else MoEConfig.from_dict(moe),
            "rope_scaling": None if scaling is None else RopeScaling(**scaling),
        }
        return cls(**{**record, **parts})

    def _check_heads(self) -> None:
        if self.head_dim is None and self.dim % self.num_heads:
            near = [h for h in range(1, self.dim + 1) if self.dim % h == 0]
            best = min(near, key=lambda h: abs(h - self.num_heads))
            raise InputError(
                f"dim={self.dim} is not divisible by num_heads={self.num_heads}; "
                f"choose num_heads={best}, or set head_dim"
            )
        if self.head_dim is not None:
            require_positive(head_dim=self.head_dim)
        if self.head_size % 2:
            raise InputError(
                f"head_dim={self.head_size} is odd, and rotary positions turn pairs of channels; choose an even one"
            )
        require_positive(num_kv_heads=self.kv_heads)
        if self.num_heads % self.kv_heads:
            raise InputError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.kv_heads}; "
                f"choose num_kv_heads among the divisors of {self.num_heads}"
            )

    def _check_moe(self, moe: MoEConfig) -> None:
        require_positive(expert_dim=self.expert_size)
        if moe.shared_expert_dim is not None:
            require_positive(shared_expert_dim=moe.shared_expert_dim)
        outside = [layer for layer in self.routed_layers if not 0 <= layer < self.num_layers]
        if outside or not self.routed_layers:
            raise InputError(
                f"moe with every={moe.every}, layers={moe.layers} names no layer, or one outside "
                f"0..{self.num_layers - 1}; choose every <= {self.num_layers}, or layers inside the model"
            )
        for name, size in (("dim", self.dim), ("expert_dim", self.expert_size)):
            if size % 8:
                raise InputError(
                    f"{name}={size} of a routed layer is not a multiple of 8, which grouped matrix products need; "
                    f"choose {name}={8 * round(size / 8) or 8}"
                )


def describe_differences(first: ModelConfig, second: ModelConfig) -> str:
    """The fields in which two architectures differ, as `name 1 / 2`, but for settings that may change on resume; empty
    when there are none."""
    left, right = _flat(first.to_dict()), _flat(second.to_dict())
    names = [*left, *(name for name in right if name not in left)]
    pairs = ((name, left.get(name), right.get(name)) for name in names)
    return ", ".join(f"{name} {one} / {other}" for name, one, other in pairs if one != other)


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields by dotted name. Of a bias rate only whether there is a bias: the rate is a training setting."""
    fields: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            fields |= {prefix + name: "set"} | _flat(value, f"{prefix}{name}.")
        elif name == "bias_update_rate":
            fields[f"{prefix}selection_bias"] = value > 0
        elif name not in TRAINING_SETTINGS:
            fields[prefix + name] = value
    return fields

"""The model families: what each one's config.json, tensors and limits are. Tables; what works on them is elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from modules.config import ModelConfig
from modules.hugging_face import keys, rows
from modules.hugging_face import requirements as need
from modules.hugging_face.keys import Entry, Key
from modules.hugging_face.requirements import Requirement, moe_of
from modules.hugging_face.rows import Row


@dataclass(frozen=True)
class Family:
    """A model family of Hugging Face.

    Attributes:
        name: its `model_type`.
        architecture: the class in `architectures`.
        entries: its config.json.
        layer: the tensors of a layer.
        requires: what it can express.
        routed: mixture-of-experts or dense.
        aliases: parts of tensors' names that stand for others in newer files.
        by_name_only: written only when it is asked for by name.
    """

    name: str
    architecture: str
    entries: tuple[Entry, ...]
    layer: tuple[Row, ...]
    requires: tuple[Requirement, ...]
    routed: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    by_name_only: bool = False


_COMMON: tuple[Entry, ...] = (
    keys.refused("quantization_config", "a quantized model"),
    keys.refused("hidden_act", "an activation other than silu", allowed=(None, "silu"), writes={"hidden_act": "silu"}),
    keys.layer_kinds(),
    Key("vocab_size", "vocab_size", int, lambda c: c.vocab_size),
    Key("hidden_size", "dim", int, lambda c: c.dim),
    Key("num_hidden_layers", "num_layers", int, lambda c: c.num_layers),
    Key("num_attention_heads", "num_heads", int, lambda c: c.num_heads),
    Key("tie_word_embeddings", "tie_embeddings", bool, lambda c: c.tie_embeddings, False),
    keys.init_std(),
)
_NORM_EPS = Key("rms_norm_eps", "norm_eps", float, lambda c: float(c.norm_eps), 1e-6)
_NORM_EPS_5 = replace(_NORM_EPS, default=1e-5)
_KV_HEADS = Key("num_key_value_heads", "num_kv_heads", int, lambda c: c.kv_heads, null=None)
_KV_HEADS_OR_ALL = replace(_KV_HEADS, default=None)
_FFN = Key("intermediate_size", "ffn_dim", int, lambda c: c.ffn_size)
_EXPERT_AS_FFN = Key("intermediate_size", "ffn_dim", int, lambda c: c.expert_size, multiple=8)
_EXPERT = Key("moe_intermediate_size", "moe.expert_dim", int, lambda c: c.expert_size, multiple=8)
_NO_QK_NORM = keys.always(qk_norm=False)
_HEAD_NORM = keys.always(qk_norm=True, qk_norm_scope="head")
_PROJECTION_NORM = keys.always(qk_norm=True, qk_norm_scope="projection")
_SWITCHED_WINDOW = keys.context(window_default=4096, switch="use_sliding_window")
_TOP_K = Key("num_experts_per_tok", "moe.top_k", int, lambda c: moe_of(c).top_k)
_LOCAL_EXPERTS = Key("num_local_experts", "moe.num_experts", int, lambda c: moe_of(c).num_experts, alias="num_experts")
_EXPERTS = Key("num_experts", "moe.num_experts", int, lambda c: moe_of(c).num_experts, alias="num_local_experts")
_NORMALISED = Key("norm_topk_prob", "moe.renormalize", bool, lambda c: moe_of(c).renormalize, False)
_QWEN_MOE = (
    _NORM_EPS,
    _EXPERTS,
    _TOP_K,
    _EXPERT,
    _FFN,
    _NORMALISED,
    keys.routed_layers(),
    _SWITCHED_WINDOW,
    keys.rope(),
)
_MIXTRAL = (
    _NORM_EPS_5,
    _KV_HEADS,
    _EXPERT_AS_FFN,
    _LOCAL_EXPERTS,
    _TOP_K,
    _NO_QK_NORM,
    keys.head_dim(),
    keys.context(),
    keys.rope(1e6),
    keys.always(**{"moe.renormalize": True}),
)


def _with_biased_o(config: ModelConfig) -> bool:
    """These families have biases on all projections or on none."""
    return config.qkv_bias


def _always(config: ModelConfig) -> bool:
    return True


_PLAIN_LAYER = rows.prenorm(rows.attention(), rows.DENSE)

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            (
                *_COMMON,
                _NORM_EPS,
                _KV_HEADS_OR_ALL,
                _FFN,
                _NO_QK_NORM,
                keys.head_dim(),
                keys.rope(),
                keys.attention_bias(),
                keys.refused(
                    "mlp_bias", "biases in the feed-forward", allowed=(None, False), writes={"mlp_bias": False}
                ),
                keys.context(windowed=False),
            ),
            _PLAIN_LAYER,
            (need.PRENORM, need.NO_NORM, need.O_LIKE_QKV, need.WHOLE_HEADS),
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            (
                *_COMMON,
                _NORM_EPS,
                _KV_HEADS,
                _FFN,
                _NO_QK_NORM,
                keys.head_dim(),
                keys.context(window_default=4096),
                keys.rope(),
            ),
            _PLAIN_LAYER,
            (need.PRENORM, need.NO_NORM, need.NO_QKV_BIAS, need.NO_O_BIAS),
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            (
                *_COMMON,
                _NORM_EPS,
                _KV_HEADS,
                _FFN,
                _NO_QK_NORM,
                keys.always(qkv_bias=True),
                keys.head_dim(always_written=False),
                _SWITCHED_WINDOW,
                keys.rope(),
            ),
            _PLAIN_LAYER,
            (need.PRENORM, need.NO_NORM, need.QKV_BIAS, need.NO_O_BIAS),
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            (
                *_COMMON,
                _NORM_EPS,
                _KV_HEADS,
                _FFN,
                _HEAD_NORM,
                keys.attention_bias(),
                keys.head_dim(128),
                _SWITCHED_WINDOW,
                keys.rope(),
            ),
            rows.prenorm(rows.attention(zero_o=_with_biased_o, norm_shapes="CC"), rows.DENSE),
            (need.PRENORM, need.normed("head"), need.O_WITH_QKV),
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            (
                *_COMMON,
                _NORM_EPS_5,
                _KV_HEADS_OR_ALL,
                _FFN,
                _PROJECTION_NORM,
                keys.always(norm_structure="postnorm"),
                keys.attention_bias(),
                keys.head_dim(always_written=False),
                keys.context(windowed=False),
                keys.rope(),
            ),
            rows.postnorm(rows.attention(zero_o=_with_biased_o, norm_shapes="QG"), rows.DENSE),
            (need.POSTNORM, need.normed("projection"), need.O_WITH_QKV),
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            (*_COMMON, *_MIXTRAL),
            rows.prenorm(rows.attention(), rows.MIXTRAL_EXPERTS),
            (
                need.PRENORM,
                need.NO_NORM,
                need.NO_QKV_BIAS,
                need.NO_O_BIAS,
                *need.MIXTRAL_ROUTING,
            ),
            routed=True,
            aliases={".mlp.": ".block_sparse_moe."},
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            (*_COMMON, *_QWEN_MOE, _KV_HEADS, _HEAD_NORM, keys.attention_bias(), keys.head_dim()),
            rows.prenorm(rows.attention(zero_o=_with_biased_o, norm_shapes="CC"), (*rows.DENSE, *rows.QWEN_EXPERTS)),
            (need.PRENORM, need.normed("head"), need.O_WITH_QKV, *need.SOFTMAX, need.NO_SHARED),
            routed=True,
        ),
        Family(
            "olmoe",
            "OlmoeForCausalLM",
            (
                *_COMMON,
                _NORM_EPS_5,
                keys.refused("clip_qkv", "clipping of queries, keys and values", writes={"clip_qkv": None}),
                _KV_HEADS_OR_ALL,
                _EXPERT_AS_FFN,
                _EXPERTS,
                _TOP_K,
                _NORMALISED,
                _PROJECTION_NORM,
                keys.attention_bias(),
                keys.context(windowed=False),
                keys.rope(),
            ),
            rows.prenorm(rows.attention(zero_o=_with_biased_o, norm_shapes="QG"), rows.QWEN_EXPERTS),
            (
                need.PRENORM,
                need.normed("projection"),
                need.PLAIN_HEADS,
                need.O_WITH_QKV,
                *need.OLMOE_ROUTING,
            ),
            routed=True,
        ),
        Family(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            (
                *_COMMON,
                *_QWEN_MOE,
                _KV_HEADS,
                _NO_QK_NORM,
                Key("qkv_bias", "qkv_bias", bool, lambda _: True, True),
                keys.shared_expert(),
                keys.head_dim(always_written=False),
            ),
            rows.prenorm(rows.attention(zero_qkv=_always), (*rows.DENSE, *rows.QWEN_EXPERTS, *rows.SHARED)),
            (need.PRENORM, need.NO_NORM, need.NO_O_BIAS, *need.SOFTMAX, need.GATED_SHARED),
            routed=True,
        ),
        Family(
            "aquilamoe",
            "AquilaMoeForCausalLM",
            (*_COMMON, *_MIXTRAL, keys.always(qkv_bias=True)),
            rows.prenorm(rows.attention(), rows.MIXTRAL_EXPERTS),
            (
                need.PRENORM,
                need.NO_NORM,
                need.QKV_BIAS,
                need.NO_O_BIAS,
                *need.MIXTRAL_ROUTING,
            ),
            routed=True,
            aliases={".mlp.": ".block_sparse_moe."},
            by_name_only=True,
        ),
    )
}
"""By `model_type`, in the order in which they are tried when a model is written."""

"""Small random models of transformers, one for each family and for what families differ in, and our twins of them."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modules.config import ModelConfig
from modules.hugging_face import open_directory
from modules.layers.transformer import Transformer
from modules.weights import Weights

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
QWEN2_MOE = QWEN_MOE | {"shared_expert_intermediate_size": 40}
QWEN3_MOE = QWEN_MOE | {"head_dim": 12}


@dataclass(frozen=True)
class Case:
    """A family and what its configuration says beside the sizes."""

    family: str
    settings: dict[str, Any]

    @property
    def module(self) -> str:
        """The family's package in transformers, which has no AquilaMoE: it is Mixtral with biases."""
        return "mixtral" if self.family == "aquilamoe" else self.family

    @property
    def is_moe(self) -> bool:
        """Whether it has experts."""
        return "moe" in self.family or self.family == "mixtral"


CASES = {
    "llama": Case("llama", {}),
    "llama-tied-mha": Case("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-biases-wide-heads": Case("llama", {"attention_bias": True, "head_dim": 14, "vocab_size": 101}),
    "llama-llama3": Case("llama", {"rope_scaling": LLAMA3}),
    "llama-linear": Case("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "mistral": Case("mistral", {"sliding_window": None, "head_dim": 6}),
    "mistral-window": Case("mistral", {"sliding_window": 64, "num_key_value_heads": 1}),
    "qwen2": Case("qwen2", {}),
    "qwen2-tied": Case("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen2-wide-heads": Case("qwen2", {"head_dim": 12}),
    "qwen3": Case("qwen3", {"head_dim": 12}),
    "qwen3-biases": Case("qwen3", {"head_dim": 8, "attention_bias": True, "rope_scaling": LLAMA3}),
    "olmo2": Case("olmo2", {}),
    "olmo2-biases-tied": Case("olmo2", {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 12}),
    "mixtral": Case("mixtral", MIXTRAL),
    "mixtral-wide-heads": Case("mixtral", MIXTRAL | {"head_dim": 12, "num_experts_per_tok": 3}),
    "qwen2_moe": Case("qwen2_moe", QWEN2_MOE),
    "qwen2_moe-normed-step": Case("qwen2_moe", QWEN2_MOE | {"norm_topk_prob": True, "decoder_sparse_step": 2}),
    "qwen2_moe-unbiased-lists": Case("qwen2_moe", QWEN2_MOE | {"qkv_bias": False, "mlp_only_layers": [1]}),
    "qwen2_moe-unshared": Case("qwen2_moe", QWEN_MOE | {"shared_expert_intermediate_size": 0}),
    "qwen3_moe": Case("qwen3_moe", QWEN3_MOE),
    "qwen3_moe-normed-lists": Case(
        "qwen3_moe", QWEN3_MOE | {"norm_topk_prob": True, "mlp_only_layers": [0], "attention_bias": True}
    ),
    "qwen3_moe-step-and-list": Case(
        "qwen3_moe", QWEN3_MOE | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]}
    ),
    "olmoe": Case("olmoe", QWEN_MOE),
    "olmoe-normed-mha": Case("olmoe", QWEN_MOE | {"norm_topk_prob": True, "num_key_value_heads": 4}),
    "aquilamoe": Case("aquilamoe", MIXTRAL),
}


def build(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of transformers whose weights are all random: norms are not 1 and biases not 0."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(case.module, **{**SIZES, **case.settings})
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager" if case.is_moe else None)
    if case.family == "aquilamoe":
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                plain = getattr(layer.self_attn, name)
                setattr(layer.self_attn, name, nn.Linear(plain.in_features, plain.out_features))
    model = model.to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3 if parameter.ndim > 1 else 0.2)
            if "norm" in name:
                parameter += 1
    return model


def save(case: Case, model: nn.Module, path: Path, **options: Any) -> Path:
    """Save a model as its family does."""
    model.save_pretrained(path, **options)
    if case.family == "aquilamoe":
        edit_config(path, model_type="aquilamoe", architectures=["AquilaMoeForCausalLM"])
    return path


def edit_config(path: Path, **changes: Any) -> None:
    """Change keys of a config.json; `...` removes one."""
    record = json.loads((path / "config.json").read_text()) | changes
    kept = {key: value for key, value in record.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(kept))


def network(config: ModelConfig, weights: Weights) -> Transformer:
    """Our network with these weights: every name and shape must fit."""
    with torch.device("meta"):
        built = Transformer(config)
    built.load_state_dict(dict(weights.items()), assign=True)
    return built.requires_grad_().eval()


def load_ours(path: Path, family: str | None = None) -> Transformer:
    """Our network with the weights of a directory."""
    model = open_directory(path, family)
    return network(model.config, model.weights)


def load_theirs(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model that transformers makes of a directory, and what it found wrong with it."""
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, dtype="auto", experts_implementation="eager"
    )
    return model.eval(), found


def logits_of(built: Transformer, tokens_BL: Tensor) -> Tensor:
    """Our logits [B, L, V]."""
    return built.logits(built(tokens_BL, decoding=True)[0])


def random_tokens(vocab_size: int, length: int = 48) -> Tensor:
    """Two sequences, longer than the original context of the rotary scalings above."""
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(1))


class _WideTorch:
    """torch, where float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def compute_wide(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the code of a family in transformers compute in float64 where it asks for float32 whatever its weights are:
    in norms, rotary frequencies and angles, and the router's softmax."""
    for name in (f"transformers.models.{case.module}.modeling_{case.module}", "transformers.modeling_rope_utils"):
        monkeypatch.setattr(importlib.import_module(name), "torch", _WideTorch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

"""Small models in the format of Hugging Face, and ways to spoil them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.config import ModelConfig
from modules.errors import InputError
from modules.hugging_face import FAMILIES, open_directory, write_directory
from modules.layers.transformer import Transformer
from modules.moe_config import MoEConfig
from modules.weights import Weights, open_safetensors, write_safetensors

DENSE = ModelConfig(vocab_size=33, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=64)
MOE = replace(DENSE, moe=MoEConfig(num_experts=4, expert_dim=8))
EXAMPLES = {
    "llama": DENSE,
    "mistral": DENSE,
    "qwen2": replace(DENSE, qkv_bias=True),
    "qwen3": replace(DENSE, qk_norm=True),
    "olmo2": replace(DENSE, norm_structure="postnorm", qk_norm=True, qk_norm_scope="projection"),
    "mixtral": MOE,
    "qwen2_moe": replace(MOE, moe=MoEConfig(num_experts=4, every=2, num_shared_experts=1, shared_gate=True)),
    "qwen3_moe": replace(MOE, qk_norm=True, moe=MoEConfig(num_experts=4, expert_dim=8, layers=(0,))),
    "olmoe": replace(MOE, qk_norm=True, qk_norm_scope="projection", tie_embeddings=True),
    "aquilamoe": replace(MOE, qkv_bias=True),
}
BY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def network(config: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    built = Transformer(config).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.5)
    return built


def write(path: Path, family: str, config: ModelConfig | None = None, **options: Any) -> Path:
    """A directory with a random model of a family."""
    config = config or EXAMPLES[family]
    options = {"tokenizer_json": None, "origin": None} | options
    write_directory(path, config=config, weights=weights_of(config), family=family, **options)
    return path


def weights_of(config: ModelConfig) -> Weights:
    return Weights.of(network(config).state_dict())


def logits(config: ModelConfig, weights: Weights) -> Tensor:
    built = Transformer(config).eval()
    built.load_state_dict(dict(weights.items()))
    tokens = torch.arange(20)[None] % config.vocab_size
    with torch.no_grad():
        return built.logits(built(tokens, decoding=True)[0])


def edit(path: Path, **changes: Any) -> None:
    """Change keys of config.json; `...` removes one."""
    record = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({key: value for key, value in record.items() if value is not ...}))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of model.safetensors."""
    tensors = {name: tensor.clone() for name, tensor in open_safetensors(path / "model.safetensors").items()}
    change(tensors)
    (path / "model.safetensors").unlink()
    write_safetensors(path / "model.safetensors", Weights.of(tensors))


def refusal(path: Path, family: str | None = None) -> str:
    """The message with which a directory is refused: one line that begins with where."""
    with pytest.raises(InputError) as caught:
        open_directory(path, family)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def sharded(path: Path) -> Path:
    write(path, "llama", max_shard_bytes=6000)
    assert len(list(path.glob("model-*-of-*.safetensors"))) > 2
    return path

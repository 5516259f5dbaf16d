"""Hugging Face directories that are wrong, or of another kind: one line each."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.errors import InputError
from modules.hugging_face import open_directory, write_directory
from modules.weights import open_safetensors
from tests.unit.hugging_face_helpers import (
    BY_FAMILY,
    DENSE,
    EXAMPLES,
    MOE,
    edit,
    edit_tensors,
    logits,
    refusal,
    sharded,
    weights_of,
    write,
)

BAD_KEYS = {
    "unknown type": ("llama", {"model_type": "gpt2"}, "model_type=gpt2 is not among the families llama, .*--family"),
    "no type": ("llama", {"model_type": ...}, "model_type=None"),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu is an activation other than silu"),
    "yarn": ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type yarn"),
    "dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type dynamic"),
    "longrope": (
        "llama",
        {"rope_scaling": None, "rope_parameters": {"rope_type": "longrope"}},
        "rope type longrope is not among default, linear and llama3",
    ),
    "no factor": ("llama", {"rope_scaling": {"type": "linear"}}, "factor is missing"),
    "by layer": ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters differ"),
    "partial": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "partial inside": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        "partial_rotary_factor=0.25",
    ),
    "quantized": ("mixtral", {"quantization_config": {"bits": 4}}, "is a quantized model"),
    "clipped": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
    "mlp bias": ("llama", {"mlp_bias": True}, "mlp_bias=True is biases in the feed-forward"),
    "layer types": ("qwen2", {"layer_types": ["linear_attention"]}, "layer_types has linear_attention"),
    "missing": ("llama", {"hidden_size": ...}, "hidden_size is missing"),
    "missing experts": ("mixtral", {"num_local_experts": ...}, "num_local_experts is missing"),
    "text": ("llama", {"hidden_size": "16"}, "hidden_size='16' is not an integer"),
    "truth for a number": ("llama", {"num_hidden_layers": True}, "num_hidden_layers=True is not an integer"),
    "number for truth": ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings=1 is not true or false"),
    "list": ("llama", {"rope_theta": [1]}, "rope_theta=.1. is not a number"),
    "llama3 without a context": (
        "llama",
        {
            "max_position_embeddings": ...,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
        "max_position_embeddings is missing",
    ),
    "heads": ("llama", {"num_key_value_heads": 3}, "num_heads=4 is not divisible by num_kv_heads=3"),
    "null": ("llama", {"rms_norm_eps": None}, "rms_norm_eps is null, and a number is needed"),
    "end of text": ("llama", {"eos_token_id": "x"}, "eos_token_id='x' is no token id, nor a list of them"),
    "narrow experts": ("qwen3_moe", {"moe_intermediate_size": 12}, "moe_intermediate_size=12 is not a multiple of 8"),
    "narrow experts of mixtral": (
        "mixtral",
        {"intermediate_size": 12},
        "intermediate_size=12 is not a multiple .*give",
    ),
}


@pytest.mark.parametrize(("family", "changes", "message"), BAD_KEYS.values(), ids=BAD_KEYS)
def test_bad_config_is_refused(family: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "hf", family)
    if changes.get("rope_parameters"):
        changes = {"rope_scaling": None} | changes
    edit(path, **changes)
    with pytest.raises(InputError, match=message):
        open_directory(path)
    refusal(path)


def test_another_name_is_read_as_a_family(tmp_path: Path) -> None:
    path = write(tmp_path / "hf", "llama")
    want = open_directory(path).config
    edit(path, model_type="mine", auto_map={"AutoModel": "code.MyModel"})
    (path / "code.py").write_text("raise SystemExit('was run')")
    model = open_directory(path, "llama")
    assert (model.family, model.config) == ("llama", want)


def test_no_directory_and_no_config(tmp_path: Path) -> None:
    assert "is not a directory" in refusal(tmp_path / "none")
    assert "holds no config.json" in refusal(tmp_path)
    for text in ("{", "[1]", "\xff"):
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        assert "config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "window"),
    [
        ("mistral", {"sliding_window": 32}, 32),
        ("mistral", {"sliding_window": 4096}, None),
        ("mistral", {"sliding_window": ..., "max_position_embeddings": 8192}, 4096),
        ("mistral", {"sliding_window": None, "max_position_embeddings": 32768}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_position_embeddings": 32768}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": ..., "max_position_embeddings": 32768}, 4096),
        ("mixtral", {"sliding_window": 16}, 16),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 24}, 24),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 24}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "layer_types": ["full_attention"] * 2}, None),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, 8),
    ],
)
def test_a_window_is_the_limit_and_is_told(family: str, changes: dict[str, Any], window: int, tmp_path: Path) -> None:
    path = write(tmp_path / "hf", family)
    edit(path, **changes)
    model = open_directory(path)
    longest = changes.get("max_position_embeddings", 64)
    assert model.config.max_seq_len == (window or longest)
    assert len(model.notes) == (window is not None) and all(f"instead of {longest}" in note for note in model.notes)


def test_null_for_no_window_is_written_and_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "hf", "mistral", replace(DENSE, max_seq_len=32768))
    assert json.loads((path / "config.json").read_text())["sliding_window"] is None
    model = open_directory(path)
    assert model.config.max_seq_len == 32768 and not model.notes
    write_directory(
        tmp_path / "2", config=model.config, weights=model.weights, tokenizer_json=None, origin=model.origin
    )
    assert (tmp_path / "2" / "config.json").read_text() == (path / "config.json").read_text()
    assert open_directory(tmp_path / "2").config == model.config


@BY_FAMILY
def test_null_key_value_heads_are_as_many_as_heads(family: str, tmp_path: Path) -> None:
    path = write(tmp_path / "hf", family, replace(EXAMPLES[family], num_kv_heads=None))
    edit(path, num_key_value_heads=None)
    assert open_directory(path).config.kv_heads == 4


def test_null_is_false_for_a_truth_value_and_not_its_default(tmp_path: Path) -> None:
    path = write(tmp_path / "hf", "qwen2_moe", replace(EXAMPLES["qwen2_moe"], qkv_bias=True))
    edit_tensors(path, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(".bias")])
    edit(path, qkv_bias=None)
    assert not open_directory(path).config.qkv_bias


@pytest.mark.parametrize("spread", [0, 0.0, None, ...])
def test_a_file_without_a_spread_of_fresh_weights_takes_ours(spread: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "hf", "llama")
    edit(path, initializer_range=spread)
    assert open_directory(path).config.init_std == DENSE.init_std
    edit(path, initializer_range=0.5)
    assert open_directory(path).config.init_std == 0.5


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
def test_deeply_nested_json_is_refused(name: str, tmp_path: Path) -> None:
    path = sharded(tmp_path / "hf")
    (path / name).write_text(f'{{"x": {DEEP}}}')
    assert f"{name} cannot be read as JSON" in refusal(path)


NORM = "model.layers.1.input_layernorm.weight"


def _set(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.__setitem__(name, tensor)


def _drop(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


EXPERT = "model.layers.0.block_sparse_moe.experts"
BAD_TENSORS = {
    "missing": ("llama", _drop(NORM), rf"tensor {NORM} of shape \[16\] is missing"),
    "missing head": ("llama", _drop("lm_head.weight"), "tensor lm_head.weight .* is missing"),
    "missing expert": ("mixtral", _drop(f"{EXPERT}.3.w2.weight"), r"experts.3.w2.weight of shape \[16, 8\] is missing"),
    "misshapen": ("llama", _set(NORM, torch.ones(17)), rf"{NORM} has shape \[17\], and config.json makes it \[16\]"),
    "transposed expert": ("mixtral", _set(f"{EXPERT}.0.w1.weight", torch.ones(16, 8)), r"makes it \[8, 16\]"),
    "extra": ("llama", _set("model.layers.2.x", torch.ones(2)), r"tensor model.layers.2.x \[2\] .* is no part"),
    "extra expert": ("mixtral", _set(f"{EXPERT}.4.w1.weight", torch.ones(8, 16)), "experts.4.w1.weight .* is no part"),
    "extra bias": ("llama", _set("model.layers.0.self_attn.q_proj.bias", torch.ones(16)), "q_proj.bias .* is no part"),
    "whole numbers": ("llama", _set(NORM, torch.ones(16, dtype=torch.int64)), "numbers of type torch.int64"),
}


@pytest.mark.parametrize(("family", "change", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_tensors_are_refused(family: str, change: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "hf", family)
    edit_tensors(path, change)
    with pytest.raises(InputError, match=message):
        open_directory(path)
    refusal(path)


def test_harmless_buffers_are_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "hf", "llama")
    edit_tensors(path, _set("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(2)))
    assert list(open_directory(path).weights.specs) == list(weights_of(DENSE).specs)


def test_a_tied_head_may_be_there_when_it_is_equal(tmp_path: Path) -> None:
    path = write(tmp_path / "hf", "llama", replace(DENSE, tie_embeddings=True))
    edit_tensors(path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert "head.weight" not in open_directory(path).weights.specs
    edit_tensors(path, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert "lm_head.weight is not equal to model.embed_tokens.weight" in refusal(path)


def test_no_shared_expert_ignores_the_gate_and_biases_must_be_announced(tmp_path: Path) -> None:
    config = replace(MOE, moe=replace(MOE.moe, every=2))
    path = write(tmp_path / "hf", "qwen2_moe", config)
    gate, bias = "model.layers.1.mlp.shared_expert_gate.weight", "model.layers.0.self_attn.q_proj.bias"
    tensors = open_safetensors(path / "model.safetensors")
    assert not tensors.read(gate).any() and not tensors.read(bias).any() and gate.replace("1", "0") not in tensors.specs
    edit_tensors(path, lambda tensors: tensors[gate].add_(1))
    model = open_directory(path)
    assert model.config.moe.num_shared_experts == 0 and model.config.qkv_bias
    assert torch.equal(logits(model.config, model.weights), logits(config, weights_of(config)))
    edit(path, qkv_bias=False)
    assert "bias [16] (of 6 such) is no part" in refusal(path)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    path = write(tmp_path / "hf", "llama")
    (path / "model.safetensors").unlink()
    assert "holds no weights" in refusal(path)
    (path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert "weights only as pytorch_model.bin, which could run code" in refusal(path)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "hf", "llama")
    data = (path / "model.safetensors").read_bytes()
    for kept in (0, 4, 100, len(data) - 1):
        (path / "model.safetensors").write_bytes(data[:kept])
        assert "cannot be read as safetensors" in refusal(path)


def test_shards_and_their_index_must_fit(tmp_path: Path) -> None:
    path = sharded(tmp_path / "hf")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    want = open_directory(path)
    name, file = next(iter(index["weight_map"].items()))

    def with_index(content: Any) -> str:
        (path / "model.safetensors.index.json").write_text(json.dumps(content))
        return refusal(path)

    assert "has no weight_map" in with_index({"metadata": {}})
    assert f"lacks the tensor {name}x" in with_index({"weight_map": {**index["weight_map"], f"{name}x": file}})
    assert "names the file ../x.safetensors, outside" in with_index({"weight_map": {name: "../x.safetensors"}})
    assert "is missing, and model.safetensors.index.json lists it" in with_index({"weight_map": {name: "none"}})
    (path / "model.safetensors.index.json").unlink()
    found = open_directory(path)
    assert all(torch.equal(tensor, found.weights.read(key)) for key, tensor in want.weights.items())
    shutil.copy(path / file, path / "again.safetensors")
    assert "as another file does" in refusal(path)
    (path / "again.safetensors").unlink()
    (path / file).unlink()
    assert "is missing" in refusal(path)

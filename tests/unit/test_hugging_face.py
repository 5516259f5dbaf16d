"""Models in the format of Hugging Face without transformers: tables, round trips, choice of family."""

import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.config import ModelConfig, RopeScaling
from modules.errors import InputError
from modules.hugging_face import FAMILIES, HuggingFaceModel, open_directory, write_directory
from modules.hugging_face.configs import failing, read_config
from modules.hugging_face.layout import pieces
from modules.hugging_face.tensors import to_theirs
from modules.moe_config import CapacityConfig, MoEConfig, RouterConfig
from modules.weights import Weights
from tests.unit.hugging_face_helpers import (
    BY_FAMILY,
    DENSE,
    EXAMPLES,
    MOE,
    logits,
    network,
    weights_of,
    write,
)


@BY_FAMILY
def test_names_and_shapes_are_those_of_the_network(family: str, tmp_path: Path) -> None:
    for number, changes in enumerate(
        ({}, {"tie_embeddings": True}, {"head_dim": 4, "num_kv_heads": 4, "num_heads": 4})
    ):
        config = replace(EXAMPLES[family], **changes)
        model = open_directory(write(tmp_path / str(number), family, config))
        want = network(model.config).state_dict()
        assert list(model.weights.specs) == list(want)
        assert {n: s.shape for n, s in model.weights.specs.items()} == {n: tuple(t.shape) for n, t in want.items()}


@BY_FAMILY
def test_every_family_is_written_and_read_back(family: str, tmp_path: Path) -> None:
    config = EXAMPLES[family]
    model = open_directory(write(tmp_path / "hf", family))
    assert model.family == family == model.origin["family"]
    assert torch.equal(logits(model.config, model.weights), logits(config, weights_of(config)))
    assert isinstance(model, HuggingFaceModel) and json.loads(json.dumps(model.origin)) == model.origin


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    flag = st.booleans()
    moe = None
    if draw(flag):
        shared = draw(st.integers(0, 2))
        moe = MoEConfig(
            num_experts=4,
            top_k=draw(st.integers(1, 3)),
            expert_dim=draw(st.sampled_from((None, 8))),
            every=draw(st.integers(1, 2)),
            layers=draw(st.sampled_from((None, (0,), (0, 1)))),
            renormalize=draw(flag),
            num_shared_experts=shared,
            shared_gate=shared > 0 and draw(flag),
            router=RouterConfig(score=draw(st.sampled_from(("softmax", "sigmoid")))),
        )
    return ModelConfig(
        vocab_size=draw(st.integers(21, 40)),
        dim=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=draw(st.sampled_from((None, 1, 2))),
        head_dim=draw(st.sampled_from((None, 6))),
        ffn_dim=draw(st.sampled_from((24, 40))),
        max_seq_len=64,
        rope_scaling=draw(st.sampled_from((None, RopeScaling(original_max_seq_len=8), RopeScaling("linear")))),
        qkv_bias=draw(flag),
        o_bias=draw(flag),
        qk_norm=draw(flag),
        qk_norm_scope=draw(st.sampled_from(("head", "projection"))),
        tie_embeddings=draw(flag),
        norm_structure=draw(st.sampled_from(("prenorm", "prenorm", "postnorm", "hybridnorm"))),
        moe=moe,
    )


@settings(max_examples=60)
@given(config=configs())
def test_a_model_is_refused_or_stays_the_same_function(config: ModelConfig, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("model") / "hf"
    weights = weights_of(config)
    expressed = [family for family in FAMILIES.values() if not family.by_name_only and not failing(config, family)]
    if not expressed:
        with pytest.raises(InputError, match=r"the nearest is .* it needs .*, and the model has"):
            write_directory(path, config=config, weights=weights, tokenizer_json=None, origin=None)
        assert not path.exists()
        return
    for family in (None, *(family.name for family in expressed)):
        shutil.rmtree(path, ignore_errors=True)
        write_directory(path, config=config, weights=weights, tokenizer_json=None, origin=None, family=family)
        model = open_directory(path)
        assert torch.equal(logits(model.config, model.weights), logits(config, weights))


def test_each_tensor_of_ours_is_read_once_while_all_of_theirs_are_written() -> None:
    config = EXAMPLES["qwen2_moe"]
    weights, reads = weights_of(config), Counter[str]()
    counted = Weights(weights.specs, lambda name: (reads.update([name]), weights.read(name))[1])
    theirs = to_theirs(counted, FAMILIES["qwen2_moe"], config)
    assert len(theirs.specs) > len(weights.specs) and not reads
    for _ in theirs.items():
        pass
    assert set(reads) == set(weights.specs) and set(reads.values()) == {1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = weights_of(MOE).cast(dtype)
    write_directory(tmp_path / "hf", config=MOE, weights=weights, tokenizer_json=None, origin=None)
    record = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert record["dtype"] == record["torch_dtype"] == str(dtype).removeprefix("torch.")
    read = open_directory(tmp_path / "hf").weights
    assert all(torch.equal(tensor, read.read(name)) and tensor.dtype == dtype for name, tensor in weights.items())


QWEN = {"rope_theta": 1000000.0, "vocab_size": 151936, "use_sliding_window": False, "max_position_embeddings": 40960}
PUBLISHED: dict[str, tuple[str, list[int], dict[str, Any], int]] = {
    "Llama-2-7b": ("llama", [4096, 11008, 32, 32, 32], {"vocab_size": 32000, "rope_scaling": None}, 6_738_415_616),
    "Llama-3.1-8B": (
        "llama",
        [4096, 14336, 32, 32, 8],
        {
            "vocab_size": 128256,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
        8_030_261_248,
    ),
    "Mistral-7B": ("mistral", [4096, 14336, 32, 32, 8], {"vocab_size": 32000, "sliding_window": 4096}, 7_241_732_096),
    "Qwen2.5-0.5B": ("qwen2", [896, 4864, 24, 14, 2], QWEN | {"tie_word_embeddings": True}, 494_032_768),
    "Qwen3-0.6B": (
        "qwen3",
        [1024, 3072, 28, 16, 8],
        QWEN | {"tie_word_embeddings": True, "head_dim": 128, "rope_theta": 1000000},
        596_049_920,
    ),
    "OLMo-2-1B": ("olmo2", [2048, 8192, 16, 16, 16], {"vocab_size": 100352}, 1_484_916_736),
    "Mixtral-8x7B": (
        "mixtral",
        [4096, 14336, 32, 32, 8],
        {"vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
        46_702_792_704,
    ),
    "Qwen1.5-MoE-A2.7B": (
        "qwen2_moe",
        [2048, 5632, 24, 16, 16],
        QWEN
        | {
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        14_315_784_192,
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        [2048, 6144, 48, 32, 4],
        QWEN | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "head_dim": 128},
        30_532_122_624,
    ),
    "OLMoE-1B-7B": (
        "olmoe",
        [2048, 1024, 16, 16, 16],
        {"vocab_size": 50304, "num_experts": 64, "num_experts_per_tok": 8, "clip_qkv": None},
        6_919_161_856,
    ),
}
"""Family, sizes (hidden, intermediate, layers, heads, key-value heads), other keys, and parameters of known models."""


@pytest.mark.parametrize(("family", "sizes", "others", "parameters"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_models_have_their_number_of_parameters(
    family: str, sizes: list[int], others: dict[str, Any], parameters: int
) -> None:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    record = {"max_position_embeddings": 4096} | dict(zip(names, sizes, strict=True)) | others
    config = read_config(record, Path("config.json"), FAMILIES[family])
    found = [piece.shape for piece in pieces(FAMILIES[family], config) if piece.ours]
    assert sum(torch.Size(shape).numel() for shape in found) == parameters
    assert not failing(config, FAMILIES[family])


# -- which family ------------------------------------------------------------------------------------------------------


def test_origin_stays_when_it_expresses_the_model(tmp_path: Path) -> None:
    def written(config: ModelConfig, origin: str, name: str) -> str:
        source = {"family": origin, "files": {}, "begin_ids": [], "end_ids": [], "token_ids": {}}
        parts = {"config": config, "weights": weights_of(config), "tokenizer_json": None, "origin": source}
        return write_directory(tmp_path / name, **parts)

    assert written(DENSE, "mistral", "a") == "mistral"
    assert written(MOE, "mistral", "b") == "mixtral"  # grown from it
    assert written(EXAMPLES["aquilamoe"], "aquilamoe", "c") == "qwen2_moe"  # transformers has no aquilamoe


NOT_EXPRESSED = {
    "sigmoid": ({"router": RouterConfig(score="sigmoid")}, "mixtral: it needs router.score=softmax"),
    "selection bias": ({"router": RouterConfig(bias_update_rate=1e-3)}, "no selection bias.*bias_update_rate=0.001"),
    "soft cap": ({"router": RouterConfig(soft_cap=30.0)}, "soft_cap=30.0"),
    "gate scale": ({"router": RouterConfig(gate_scale=2.5)}, "it needs router.gate_scale=1.*gate_scale=2.5"),
    "groups": ({"router": RouterConfig(expert_groups=2, top_groups=1)}, "expert_groups=2, top_groups=1"),
    "expert choice": (
        {
            "router": RouterConfig(kind="expert_choice"),
            "capacity": CapacityConfig(2.0),
            "balance_loss_weight": 0.0,
            "renormalize": False,
        },
        "router.kind=top_k",
    ),
    "shared without gate": ({"num_shared_experts": 1}, "shared_gate=false"),
    "hybridnorm": ({"norm_structure": "hybridnorm"}, "llama: it needs norm_structure=prenorm.*hybridnorm"),
    "postnorm alone": ({"norm_structure": "postnorm"}, "norm_structure=postnorm"),
    "o bias alone": ({"o_bias": True}, "it needs .*o_bias"),
}


@pytest.mark.parametrize(("changes", "message"), NOT_EXPRESSED.values(), ids=NOT_EXPRESSED)
def test_what_no_family_expresses_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    dense = set(changes) <= {"norm_structure", "o_bias"}
    config = replace(DENSE, **changes) if dense else replace(MOE, moe=replace(MOE.moe, **changes))
    with pytest.raises(InputError, match=message):
        write_directory(tmp_path / "hf", config=config, weights=weights_of(config), tokenizer_json=None, origin=None)
    assert not list(tmp_path.iterdir())


EXPRESSED = {
    "llama": (DENSE, {"llama", "mistral"}),
    "llama with biases": (replace(DENSE, qkv_bias=True, o_bias=True), {"llama"}),
    "wide heads": (replace(DENSE, dim=18, head_dim=6), {"mistral"}),
    "qwen2": (EXAMPLES["qwen2"], {"qwen2"}),
    "qwen3": (EXAMPLES["qwen3"], {"qwen3"}),
    "qwen3 with biases": (replace(DENSE, qk_norm=True, qkv_bias=True, o_bias=True), {"qwen3"}),
    "olmo2": (EXAMPLES["olmo2"], {"olmo2"}),
    "mixtral": (MOE, {"mixtral", "qwen2_moe"}),
    "every second": (replace(MOE, moe=replace(MOE.moe, every=2)), {"qwen2_moe"}),
    "not renormalised": (replace(MOE, moe=replace(MOE.moe, renormalize=False)), {"qwen2_moe"}),
    "shared": (EXAMPLES["qwen2_moe"], {"qwen2_moe"}),
    "qwen3_moe": (EXAMPLES["qwen3_moe"], {"qwen3_moe"}),
    "olmoe": (EXAMPLES["olmoe"], {"olmoe"}),
    "olmoe every second": (replace(EXAMPLES["olmoe"], moe=replace(MOE.moe, every=2)), set()),
    "olmoe with wide heads": (replace(EXAMPLES["olmoe"], head_dim=6), set()),
    "aquilamoe": (EXAMPLES["aquilamoe"], {"aquilamoe", "qwen2_moe"}),
}


@pytest.mark.parametrize(("example", "family"), itertools.product(EXPRESSED, FAMILIES))
def test_a_wanted_family_is_written_exactly_or_refused(example: str, family: str, tmp_path: Path) -> None:
    config, expressed = EXPRESSED[example]
    parts = {"config": config, "weights": weights_of(config), "tokenizer_json": None, "origin": None}
    if family not in expressed:
        with pytest.raises(InputError, match=f"family={family} does not express this model: it needs"):
            write_directory(tmp_path / "hf", family=family, **parts)
        assert not list(tmp_path.iterdir())
    else:
        assert write_directory(tmp_path / "hf", family=family, **parts) == family
        model = open_directory(tmp_path / "hf")
        assert torch.equal(logits(model.config, model.weights), logits(config, parts["weights"]))


def test_unknown_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"family=gpt2 is not among the families llama, .*choose"):
        write(tmp_path / "hf", "gpt2", DENSE)

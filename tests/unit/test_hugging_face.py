"""Models in the format of Hugging Face without transformers: tables, round trips, choice of family, and bad input."""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from app.checkpoint import open_weights, read_metadata, read_tokenizer_json
from app.commands import exchange
from datamodules.tokenizer import Tokenizer, train_tokenizer
from modules.config import ModelConfig, RopeScaling
from modules.errors import InputError
from modules.hugging_face import FAMILIES, HuggingFaceModel, open_directory, write_directory
from modules.hugging_face.configs import failing, read_config
from modules.hugging_face.layout import pieces
from modules.hugging_face.special_tokens import END_OF_TEXT
from modules.hugging_face.tensors import to_theirs
from modules.layers.transformer import Transformer
from modules.moe_config import CapacityConfig, MoEConfig, RouterConfig
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


# -- tables ------------------------------------------------------------------------------------------------------------


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


# -- config.json that is wrong, or of another kind ---------------------------------------------------------------------

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


# -- weights that are wrong --------------------------------------------------------------------------------------------

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


def sharded(path: Path) -> Path:
    write(path, "llama", max_shard_bytes=6000)
    assert len(list(path.glob("model-*-of-*.safetensors"))) > 2
    return path


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


# -- writing -----------------------------------------------------------------------------------------------------------


def test_files_say_which_format_they_have(tmp_path: Path) -> None:
    """Older versions of transformers refuse files that do not."""
    for path in (write(tmp_path / "one", "llama"), sharded(tmp_path / "many")):
        for file in path.glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                assert opened.metadata() == {"format": "pt"}


def test_an_output_that_exists_stays(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    with pytest.raises(InputError, match="exists, and nothing is overwritten"):
        write(tmp_path / "hf", "llama")
    assert list(tmp_path.iterdir()) == [tmp_path / "hf"] and not list((tmp_path / "hf").iterdir())


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    weights = weights_of(DENSE)

    def read(name: str) -> Tensor:
        if name == "final_norm.weight":
            raise OSError("no space left")
        return weights.read(name)

    with pytest.raises(OSError, match="no space"):
        write_directory(
            tmp_path / "hf", config=DENSE, weights=Weights(weights.specs, read), tokenizer_json=None, origin=None
        )
    assert not list(tmp_path.iterdir())


def test_files_of_the_origin_are_written_back(tmp_path: Path) -> None:
    source = write(tmp_path / "hf", "llama")
    tokenizer = train_tokenizer(["some text"], 270).to_json()
    texts = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": '{"chat_template": "你好",\r\n "x": 1}',
        "special_tokens_map.json": "{}",
        "generation_config.json": '{"eos_token_id": [5, 7], "temperature": 0.6}',
        "chat_template.jinja": "{{ messages }}\n",
        "added_tokens.json": "{}",
    }
    for name, text in texts.items():
        (source / name).write_bytes(text.encode())
    edit(source, bos_token_id=3, eos_token_id=4, pad_token_id=0)
    model = open_directory(source)
    assert model.origin["end_ids"] == [5, 7] and model.tokenizer_json == tokenizer
    write_directory(
        tmp_path / "out",
        config=model.config,
        weights=model.weights,
        tokenizer_json=model.tokenizer_json,
        origin=json.loads(json.dumps(model.origin)),
    )
    assert {name: (tmp_path / "out" / name).read_bytes().decode() for name in texts} == texts
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (record["bos_token_id"], record["eos_token_id"], record["pad_token_id"]) == (3, 4, 0)
    (source / "generation_config.json").unlink()
    assert open_directory(source).origin["end_ids"] == [4]


@pytest.mark.parametrize("ids", ["x", 1.5, True, [1, None], {"a": 1}])
def test_ids_of_generation_are_numbers(ids: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "hf", "llama")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert "generation_config.json: eos_token_id=" in refusal(path)


def test_a_tokenizer_without_end_of_text_is_not_exported(tmp_path: Path) -> None:
    text = foreign_tokenizer(["<begin>"]).to_str()
    with pytest.raises(InputError, match="has no end-of-text token"):
        write(tmp_path / "hf", "llama", tokenizer_json=text)
    assert not list(tmp_path.iterdir())
    source = {"family": "llama", "files": {}, "begin_ids": [], "end_ids": [], "token_ids": {}}
    write(tmp_path / "hf", "llama", tokenizer_json=text, origin=source)  # of an imported model it may be so
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == text


@pytest.mark.parametrize("name", END_OF_TEXT)
def test_every_name_of_an_end_is_written(name: str, tmp_path: Path) -> None:
    inner = foreign_tokenizer([name])
    path = write(tmp_path / "hf", "llama", tokenizer_json=inner.to_str())
    end = inner.token_to_id(name)
    record = json.loads((path / "config.json").read_text())
    assert record["bos_token_id"] == record["eos_token_id"] == end == Tokenizer.from_json(inner.to_str()).eos_id
    origin = open_directory(path).origin
    assert origin["begin_ids"] == origin["end_ids"] == [end]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_broken_files_beside_the_model_are_refused(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "hf", "llama", tokenizer_json=train_tokenizer(["text"], 270).to_json())
    for text in (b"{", b"\xff"):
        (path / name).write_bytes(text)
        assert name in refusal(path)


# -- commands ----------------------------------------------------------------------------------------------------------


def test_import_writes_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "hf", "mistral")
    edit(source, sliding_window=32)
    exchange.import_(source, output=tmp_path / "checkpoint", dtype="bfloat16")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("mistral: 0.0") and "M parameters" in shown[0]
    assert "window of 32 tokens" in shown[1] and "--tokenizer FILE" in shown[2] and shown[3].endswith("checkpoint")
    metadata, weights = read_metadata(tmp_path / "checkpoint"), open_weights(tmp_path / "checkpoint")
    want = weights_of(DENSE).cast(torch.bfloat16)
    assert all(torch.equal(tensor, weights.read(name)) for name, tensor in want.items())
    assert ModelConfig.from_dict(metadata["architecture"]) == open_directory(source).config
    assert metadata["origin"]["family"] == "mistral" and metadata["step"] == 0
    assert read_tokenizer_json(tmp_path / "checkpoint") is None
    exchange.export(tmp_path / "checkpoint", output=tmp_path / "out", dtype="float32", max_shard_size="5KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mistral"


def test_import_takes_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some text"], 270)
    (tmp_path / "mine.json").write_text(tokenizer.to_json())
    source = write(tmp_path / "hf", "llama", replace(DENSE, vocab_size=tokenizer.vocab_size))
    exchange.import_(source, output=tmp_path / "checkpoint", tokenizer=tmp_path / "mine.json")
    assert read_tokenizer_json(tmp_path / "checkpoint") == tokenizer.to_json()
    small = write(tmp_path / "small", "llama")
    for path, message in ((tmp_path / "mine.json", "gives ids up to"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(InputError, match=message):
            exchange.import_(small, output=tmp_path / "other", tokenizer=path)
    assert not (tmp_path / "other").exists()


def foreign_tokenizer(special: list[str], begin: str = "", words: str = "ab") -> tokenizers.Tokenizer:
    """Letters and special tokens, and one of these in front of every text."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    inner.add_special_tokens(special)
    if begin:
        template = {"single": f"{begin} $A", "special_tokens": [(begin, inner.token_to_id(begin))]}
        inner.post_processor = tokenizers.processors.TemplateProcessing(**template)
    return inner


OLD = foreign_tokenizer(["<s>", "</s>", "<pad>", "<|im_end|>"], "<s>")  # 2, 3, 4, 5
GENERATION = {"bos_token_id": 2, "eos_token_id": [3, 5], "pad_token_id": 4, "temperature": 0.6}
NEW = {
    "its names": (foreign_tokenizer(["<pad>", "<|im_end|>", "</s>", "<s>"], "<s>"), [5], [4, 3], (5, [4, 3], 2)),
    "one of its names": (foreign_tokenizer(["<|im_end|>", "<b>"], "<b>"), [3], [2], (3, 2, None)),
    "other names": (foreign_tokenizer(["<b>", "<|eot_id|>", "<|pad|>"]), [], [3], (None, 3, 4)),
    "no names": (foreign_tokenizer(["<b>"]), [], [], (None, None, None)),
    "the same ids": (foreign_tokenizer(["<s>", "</s>", "<pad>", "<|im_end|>", "<x>"]), [], [3, 5], (2, [3, 5], 4)),
}
"""Another tokenizer, and with it begin and end ids, and ids of begin, end and padding in config.json."""


@pytest.mark.parametrize("name", NEW)
def test_another_tokenizer_brings_its_own_ids(name: str, tmp_path: Path) -> None:
    inner, begin, end, ids = NEW[name]
    source = write(tmp_path / "hf", "llama", tokenizer_json=OLD.to_str())
    edit(source, bos_token_id=2, eos_token_id=3, pad_token_id=4)
    texts = {"generation_config.json": json.dumps(GENERATION), "chat_template.jinja": "{{ old }}"}
    for file, text in (texts | dict.fromkeys(("tokenizer_config.json", "added_tokens.json"), '{"old": 1}')).items():
        (source / file).write_text(text)
    (tmp_path / "new.json").write_text(inner.to_str())
    exchange.import_(source, output=tmp_path / "checkpoint", tokenizer=tmp_path / "new.json")
    exchange.export(tmp_path / "checkpoint", output=tmp_path / "out")
    for origin in (read_metadata(tmp_path / "checkpoint")["origin"], open_directory(tmp_path / "out").origin):
        assert (origin["begin_ids"], origin["end_ids"]) == (begin, end)
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (record["bos_token_id"], record["eos_token_id"], record["pad_token_id"]) == ids
    assert (
        not (tmp_path / "out" / "chat_template.jinja").exists()
        and not (tmp_path / "out" / "added_tokens.json").exists()
    )
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "old" not in settings and settings.get("bos_token") == (
        None if ids[0] is None else inner.id_to_token(ids[0])
    )
    kept = (tmp_path / "out" / "generation_config.json").read_text() == json.dumps(GENERATION)
    assert kept == (name == "the same ids")


@pytest.mark.parametrize(
    ("special", "end", "kept"),
    [
        (["<s>", "<|end_of_text|>", "<pad>", "<|eot_id|>"], [3, 5], True),  # the model's own: its ids are called so
        (["<s>", "<pad>", "<|eot_id|>", "<x>"], [4], False),
    ],
)
def test_a_tokenizer_for_a_model_that_had_none(special: list[str], end: list[int], kept: bool, tmp_path: Path) -> None:
    source = write(tmp_path / "hf", "llama")
    (source / "generation_config.json").write_text(json.dumps(GENERATION))
    (tmp_path / "new.json").write_text(foreign_tokenizer(special).to_str())
    exchange.import_(source, output=tmp_path / "checkpoint", tokenizer=tmp_path / "new.json")
    origin = read_metadata(tmp_path / "checkpoint")["origin"]
    assert origin["end_ids"] == end and ("generation_config.json" in origin["files"]) == kept


@pytest.mark.parametrize(
    "size", ["", "5", "five GB", "-1GB", "0GB", "5 XB", "1e3MB", "9" * 400 + "GB", "9" * 300 + "TB"]
)
def test_sizes_that_are_none(size: str, tmp_path: Path) -> None:
    if size == "5":
        assert exchange._bytes(size) == 5
        return
    with pytest.raises(InputError, match="is not a size") as caught:
        exchange.export(tmp_path, output=tmp_path / "out", max_shard_size=size)
    assert len(str(caught.value)) < 150


def test_sizes() -> None:
    assert [exchange._bytes(size) for size in ("5GB", "1.5 mb", "2GiB", "7B")] == [5 * 10**9, 1_500_000, 2**31, 7]


def test_commands_overwrite_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "hf", "llama")
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="nothing is ever overwritten"):
        exchange.import_(source, output=tmp_path / "there")
    exchange.import_(source, output=tmp_path / "checkpoint")
    with pytest.raises(InputError, match="nothing is ever overwritten"):
        exchange.export(tmp_path / "checkpoint", output=tmp_path / "there")
    with pytest.raises(InputError, match="is not a checkpoint"):
        exchange.export(source, output=tmp_path / "new")
    assert not list((tmp_path / "there").iterdir()) and not (tmp_path / "new").exists()

"""Models of transformers against ours: every family read, written, computed and decoded alike.

transformers computes norms, rotary angles and the router's softmax in float32 whatever the weights are. In float64 they
are therefore made to compute wide (`compute_wide`); nothing else of them is changed.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from app.commands.exchange import export, import_
from datamodules.tokenizer import Tokenizer, train_tokenizer
from modules.config import ModelConfig, RopeScaling
from modules.generation import complete
from modules.hugging_face import open_directory, write_directory
from modules.hugging_face.families import FAMILIES
from modules.hugging_face.tensors import to_ours
from modules.layers.transformer import Transformer
from modules.moe_config import CapacityConfig, MoEConfig, RouterConfig
from modules.weights import Weights
from tests.parity.hugging_face_models import (
    CASES,
    Case,
    build,
    compute_wide,
    load_ours,
    load_theirs,
    logits_of,
    network,
    random_tokens,
    save,
)

pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # shared experts of width 0
BY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
MOE = {name: case for name, case in CASES.items() if case.is_moe}
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def assert_close(got: Tensor, want: Tensor, name: str = "logits") -> None:
    """Equal but for the type's tolerance, relative to the largest entry."""
    size = want.abs().max().item()
    assert size > 0, name
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[want.dtype] * size, msg=lambda text: f"{name}: {text}")


def tree(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def export_again(source: Path, output: Path, family: str | None = None) -> str:
    """Import a directory and export what that gives."""
    model = open_directory(source, family)
    return write_directory(
        output,
        config=model.config,
        weights=model.weights,
        tokenizer_json=model.tokenizer_json,
        origin=model.origin,
        family=family,
    )


# -- the same function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@BY_CASE
def test_logits_and_gradients(case: Case, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if dtype == torch.float64:
        compute_wide(case, monkeypatch)
    theirs = build(case, dtype)
    ours = load_ours(save(case, theirs, tmp_path / "hf"))
    assert next(ours.parameters()).dtype == dtype
    tokens = random_tokens(ours.config.vocab_size)
    want, got = theirs(tokens).logits, logits_of(ours, tokens)
    assert_close(got, want)
    probe = torch.randn(want.shape, dtype=dtype)
    (want * probe).sum().backward()
    (got * probe).sum().backward()
    gradients = Weights.of({name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.numel()})
    expected = to_ours(gradients, FAMILIES[case.family], ours.config, "gradients")
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == expected.specs.keys()
    for name, gradient in expected.items():
        assert_close(parameters[name].grad, gradient, name)


@BY_CASE
def test_greedy_tokens(case: Case, tmp_path: Path) -> None:
    theirs = build(case)
    ours = load_ours(save(case, theirs, tmp_path / "hf"))
    prompt = random_tokens(ours.config.vocab_size)[:1, :11]
    num_new = min(64, ours.config.max_seq_len - prompt.shape[1])
    sampling = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": num_new}
    want = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **sampling)[0, prompt.shape[1] :].tolist()
    (got,) = complete(ours, prompt.tolist(), max_new_tokens=num_new, end_ids=[])
    assert got == want and len(got) == num_new > 50


# -- written and read again --------------------------------------------------------------------------------------------


@BY_CASE
def test_export_is_the_same_model(case: Case, tmp_path: Path) -> None:
    model = build(case)
    source = save(case, model, tmp_path / "hf")
    first, second = tmp_path / "first", tmp_path / "second"
    assert export_again(source, first) == ("qwen2_moe" if case.family == "aquilamoe" else case.family)
    export_again(first, second)
    assert tree(first) == tree(second)
    loaded, found = load_theirs(first)
    assert_nothing_wrong(loaded, found)
    tokens = random_tokens(model.config.vocab_size)
    assert_close(loaded(tokens).logits, model(tokens).logits)


def assert_nothing_wrong(loaded: nn.Module, found: dict[str, object]) -> None:
    """No tensor is missing or too many, but for those without an entry: a shared expert of width 0."""
    empty = {name for name, parameter in loaded.named_parameters() if not parameter.numel()}
    assert set(found["missing_keys"]) - empty == set()
    assert not found["unexpected_keys"] and not found["mismatched_keys"]


def test_aquilamoe_is_written_when_it_is_asked_for(tmp_path: Path) -> None:
    case = CASES["aquilamoe"]
    source = save(case, build(case), tmp_path / "hf")
    first, second = tmp_path / "first", tmp_path / "second"
    assert export_again(source, first, "aquilamoe") == "aquilamoe"
    assert export_again(first, second, "aquilamoe") == "aquilamoe"
    assert tree(first) == tree(second)
    assert json.loads((first / "config.json").read_text())["model_type"] == "aquilamoe"
    for name, tensor in open_directory(source).weights.items():
        assert torch.equal(tensor, open_directory(first).weights.read(name)), name


@pytest.mark.parametrize("case", MOE.values(), ids=MOE)
def test_both_layouts_of_experts(case: Case, tmp_path: Path) -> None:
    model = build(case)
    by_expert = open_directory(save(case, model, tmp_path / "old"))
    stacked = open_directory(save(case, model, tmp_path / "new", save_original_format=False))
    old, new = (b"gate_up_proj" in (tmp_path / name / "model.safetensors").read_bytes() for name in ("old", "new"))
    assert (old, new) == (False, True)
    for name, tensor in stacked.weights.items():
        assert torch.equal(tensor, by_expert.weights.read(name)), name


@pytest.mark.parametrize("name", ["llama-tied-mha", "mixtral", "qwen2_moe"])
def test_shards(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = build(case)
    source = save(case, model, tmp_path / "hf", max_shard_size="20KB")
    assert len(list(source.glob("model-*.safetensors"))) > 2
    opened = open_directory(source)
    write_directory(
        tmp_path / "out",
        config=opened.config,
        weights=opened.weights,
        tokenizer_json=None,
        origin=opened.origin,
        max_shard_bytes=20_000,
    )
    written = list((tmp_path / "out").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(written) > 2 and {file.name for file in written} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(spec.num_bytes for spec in _specs(tmp_path / "out"))
    loaded, found = load_theirs(tmp_path / "out")
    assert_nothing_wrong(loaded, found)
    tokens = random_tokens(model.config.vocab_size)
    assert_close(loaded(tokens).logits, model(tokens).logits)
    (tmp_path / "out" / "model.safetensors.index.json").unlink()
    without_index = open_directory(tmp_path / "out").weights
    assert all(torch.equal(tensor, without_index.read(name)) for name, tensor in opened.weights.items())


def _specs(path: Path) -> list:
    from modules.weights import open_safetensors

    return [spec for file in path.glob("*.safetensors") for spec in open_safetensors(file).specs.values()]


# -- configurations trained here ---------------------------------------------------------------------------------------

SMALL = ModelConfig(vocab_size=101, dim=48, num_layers=4, num_heads=3, max_seq_len=64)
EVERY_SECOND = MoEConfig(num_experts=4, top_k=2, every=2)
GSHARD = replace(EVERY_SECOND, every=1, router=RouterConfig(kind="gshard"), capacity=CapacityConfig(2.0))
SHARED = replace(EVERY_SECOND, num_shared_experts=2, shared_expert_dim=16, shared_gate=True, expert_dim=24)
PROJECTION = {"qk_norm": True, "qk_norm_scope": "projection"}
TRAINED = {
    "dense": (SMALL, "llama"),
    "dense-odd-heads": (replace(SMALL, dim=40, head_dim=14), "mistral"),
    "dense-scaled": (replace(SMALL, rope_scaling=RopeScaling(original_max_seq_len=16)), "llama"),
    "dense-biased": (replace(SMALL, qkv_bias=True, o_bias=True, num_kv_heads=1), "llama"),
    "dense-qkv-biased": (replace(SMALL, qkv_bias=True, tie_embeddings=True), "qwen2"),
    "dense-head-norm": (replace(SMALL, qk_norm=True), "qwen3"),
    "dense-head-norm-qkv-biased": (replace(SMALL, qk_norm=True, qkv_bias=True), "qwen3"),
    "dense-postnorm": (replace(SMALL, norm_structure="postnorm", qkv_bias=True, **PROJECTION), "olmo2"),
    "every-second": (replace(SMALL, moe=EVERY_SECOND), "qwen2_moe"),
    "every-second-tied": (replace(SMALL, moe=EVERY_SECOND, tie_embeddings=True, qkv_bias=True), "qwen2_moe"),
    "listed-layers": (replace(SMALL, moe=replace(EVERY_SECOND, layers=(0, 1, 3))), "qwen2_moe"),
    "gshard": (replace(SMALL, moe=GSHARD), "mixtral"),
    "softmax-of-top-k": (
        replace(SMALL, moe=MoEConfig(num_experts=4, router=RouterConfig(score="softmax_of_top_k"))),
        "mixtral",
    ),
    "not-renormalised": (replace(SMALL, moe=MoEConfig(num_experts=4, renormalize=False)), "qwen2_moe"),
    "shared": (replace(SMALL, moe=SHARED), "qwen2_moe"),
    "routed-head-norm": (replace(SMALL, moe=EVERY_SECOND, qk_norm=True, qkv_bias=True), "qwen3_moe"),
    "routed-projection-norm": (replace(SMALL, moe=MoEConfig(num_experts=4), qkv_bias=True, **PROJECTION), "olmoe"),
}


@pytest.mark.parametrize(("config", "family"), TRAINED.values(), ids=TRAINED)
def test_models_trained_here_load_in_transformers(config: ModelConfig, family: str, tmp_path: Path) -> None:
    ours = randomized(config)
    weights = Weights.of(ours.state_dict())
    parts = {"config": config, "weights": weights, "tokenizer_json": None}
    assert write_directory(tmp_path / "first", **parts, origin=None) == family
    loaded, found = load_theirs(tmp_path / "first")
    assert_nothing_wrong(loaded, found)
    tokens = random_tokens(config.vocab_size)
    assert_close(loaded(tokens).logits, logits_of(ours, tokens))
    assert export_again(tmp_path / "first", tmp_path / "second") == family
    assert tree(tmp_path / "first") == tree(tmp_path / "second")


def randomized(config: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    built = Transformer(config).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.normal_(std=0.3 if parameter.ndim > 1 else 0.2)
            if "norm" in name:
                parameter += 1
    return network(config, Weights.of(built.state_dict()))


# -- forms of config.json ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-llama3", "llama-linear", "mixtral"])
def test_each_form_of_rotary_parameters_alone_is_read_alike(name: str, tmp_path: Path) -> None:
    """What we write holds the new and the old form; each alone gives transformers and us the same frequencies."""
    from transformers import AutoConfig

    case = CASES[name]
    export_again(save(case, build(case), tmp_path / "hf"), tmp_path / "out")
    config, record = open_directory(tmp_path / "out").config, json.loads((tmp_path / "out" / "config.json").read_text())
    want = AutoConfig.from_pretrained(tmp_path / "hf").rope_parameters
    for kept in (
        {"rope_parameters"},
        {"rope_theta", "rope_scaling"},
        {"rope_parameters", "rope_theta", "rope_scaling"},
    ):
        dropped = {"rope_parameters", "rope_theta", "rope_scaling"} - kept
        text = json.dumps({key: value for key, value in record.items() if key not in dropped})
        (tmp_path / "out" / "config.json").write_text(text)
        assert open_directory(tmp_path / "out").config == config
        assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == want


# -- tokenizers --------------------------------------------------------------------------------------------------------

TEXTS = ("The quick fox, 12 dogs", "", "  你好,世界! \r\n x", "it spells <|eos|> and <s> </s>")


def foreign(name: str) -> Tokenizer:
    """Ours with the special tokens and the post-processor of others."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import processors

    special = {"llama 3": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]}.get(name, ["<s>", "</s>", "<pad>"])
    text = train_tokenizer(["The quick brown fox, 12 dogs.\n你好,世界!"] * 20, 320).to_json()
    if name == "ours":
        return Tokenizer.from_json(text)
    for own, other in zip(("<|bos|>", "<|eos|>", "<|pad|>"), special, strict=True):
        text = text.replace(own, other)
    inner = Inner.from_str(text)
    template = processors.TemplateProcessing(
        single=f"{special[0]} $A", pair=f"{special[0]} $A {special[0]} $B", special_tokens=[(special[0], 0)]
    )
    level = processors.ByteLevel(trim_offsets=False)
    inner.post_processor = {
        "llama 3": processors.Sequence([level, template]),
        "template": template,
        "byte level": level,
        "both": processors.Sequence([level, template]),
        "nested": processors.Sequence([processors.Sequence([template, level]), template]),
        "roberta": processors.RobertaProcessing(("</s>", 1), ("<s>", 0)),
        "padded": template,
    }[name]
    if name == "padded":
        inner.enable_padding(length=64, pad_id=2, pad_token="<pad>")
        inner.enable_truncation(3)
    return Tokenizer.from_json(inner.to_str())


FOREIGN = ["ours", "llama 3", "template", "byte level", "both", "nested", "roberta", "padded"]


@pytest.mark.parametrize("name", FOREIGN)
def test_tokenizer_of_a_model_trained_here(name: str, tmp_path: Path) -> None:
    """Theirs puts one end-of-text token in front, as growmoe does, and splits and joins text as ours does."""
    from transformers import AutoTokenizer

    ours = foreign(name)
    config = replace(SMALL, vocab_size=ours.vocab_size)
    weights = Weights.of(randomized(config).state_dict())
    write_directory(tmp_path / "hf", config=config, weights=weights, tokenizer_json=ours.to_json(), origin=None)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ids == [ours.eos_id, *ours.encode(text)]
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.eos_id, ours.eos_id)
    assert theirs.pad_token_id == (2 if name == "ours" else None)
    assert theirs.model_max_length == config.max_seq_len
    model = open_directory(tmp_path / "hf")
    assert (model.origin["begin_ids"], model.origin["end_ids"]) == ([ours.eos_id], [ours.eos_id])
    assert export_again(tmp_path / "hf", tmp_path / "second") == "llama"
    assert tree(tmp_path / "hf") == tree(tmp_path / "second")


def test_another_tokenizer_of_an_imported_model_is_read_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = foreign("llama 3")
    case = Case("llama", {"vocab_size": ours.vocab_size})
    source = save(case, build(case), tmp_path / "hf")
    (source / "tokenizer.json").write_text(foreign("template").to_json())
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}')
    (tmp_path / "tokenizer.json").write_text(ours.to_json())
    import_(source, output=tmp_path / "checkpoint", tokenizer=tmp_path / "tokenizer.json")
    export(tmp_path / "checkpoint", output=tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert theirs(text).input_ids == [0, *ours.encode(text, special_tokens=True)]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True}, {"add_bos_token": False}], ids=str)
@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>", "<cls> <s> $A"])
def test_begin_of_a_tokenizer_is_that_of_transformers(template: str, settings: dict, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, pre_tokenizers, processors
    from transformers import AutoTokenizer

    special = {"<s>": 1, "</s>": 2, "<cls>": 3}
    inner = Inner(models.WordLevel({"a": 0, "b": 4, "?": 5} | special, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(list(special))
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(special.items()))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    case = CASES["llama"]
    source = save(case, build(case), tmp_path / "hf")
    (source / "tokenizer.json").write_text(inner.to_str())
    written = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **settings}
    (source / "tokenizer_config.json").write_text(json.dumps(written))
    ids = AutoTokenizer.from_pretrained(source)("a b").input_ids
    begin = open_directory(source).origin["begin_ids"]
    assert ids[: ids.index(0)] == begin
    export_again(source, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a b").input_ids == ids


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied-mha", "mixtral", "qwen2_moe-normed-step"])
def test_commands_there_and_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    model = build(case)
    source = save(case, model, tmp_path / "hf")
    import_(source, output=tmp_path / "checkpoint")
    assert capsys.readouterr().out.startswith(f"{case.family}: ")
    export(tmp_path / "checkpoint", output=tmp_path / "out")
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'out'}\n")
    import_(tmp_path / "out", output=tmp_path / "checkpoint-2")
    export(tmp_path / "checkpoint-2", output=tmp_path / "out-2")
    assert tree(tmp_path / "out") == tree(tmp_path / "out-2")
    loaded, found = load_theirs(tmp_path / "out")
    assert_nothing_wrong(loaded, found)
    tokens = random_tokens(model.config.vocab_size)
    assert_close(loaded(tokens).logits, model(tokens).logits)

"""Continuations against `generate` of transformers: greedy, left-padded batches, several end tokens, and text."""

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from app.cli import main
from app.loading import load_model
from datamodules.tokenizer import train_tokenizer
from modules.generation import begin, complete
from tests.reference.sentence_pieces import inner_sentence_piece_like

transformers = pytest.importorskip("transformers")

NEW_TOKENS = 24
TEXTS = ["the lazy fox", "x", "你好，世界。the quick", "dog jumps over the lazy dog. the fox"]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.5,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
EAGER = {"experts_implementation": "eager"}  # grouped products know no float64
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_theta": 500.0}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights in float64. Qwen2's tokenizer is byte-level and puts nothing in front of a text, the
    others have one like Llama 2's, which puts <s> there.
    """
    name, extra = FAMILIES[request.param]
    path = tmp_path_factory.mktemp(request.param)
    inner = inner_sentence_piece_like("byte fallback", num_bytes=0)
    if request.param == "qwen2":
        inner = Tokenizer.from_str(train_tokenizer(TEXTS * 3, 300).to_json())
    torch.manual_seed(0)
    config_class = getattr(importlib.import_module(f"transformers.models.{request.param}"), f"{name}Config")
    model_class = getattr(transformers, f"{name}ForCausalLM")
    config = config_class(**SIZES, **extra, vocab_size=inner.get_vocab_size(), eos_token_id=2)
    model = model_class(config).double()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    model.generation_config.eos_token_id = [2, 31]
    model.save_pretrained(path)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=inner.id_to_token(0))
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, **EAGER).eval()


@pytest.fixture(scope="module")
def their_tokenizer(directory: Path) -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(directory, padding_side="left")


def continue_theirs(theirs: Any, encoded: Any, end_ids: list[int]) -> list[list[int]]:
    """New tokens up to the end token."""
    with torch.no_grad():
        found = theirs.generate(
            **encoded, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=end_ids or None, pad_token_id=0
        )
    new = found[:, encoded["input_ids"].shape[1] :].tolist()
    return [row[: next((at for at, token in enumerate(row) if token in end_ids), len(row))] for row in new]


def encode(their_tokenizer: Any, texts: list[str]) -> Any:
    encoded = their_tokenizer(texts, return_tensors="pt", padding=True)
    return {key: encoded[key] for key in ("input_ids", "attention_mask")}


def test_begin_and_end_tokens_are_those_of_transformers(directory: Path, their_tokenizer: Any) -> None:
    model = load_model(directory)
    assert model.tokenizer is not None
    assert model.begin_ids == ([] if directory.name.startswith("qwen2") else [1])
    assert model.end_ids == [2, 31] and model.tokenizer.eos_id == 2
    for text in TEXTS:
        assert begin(model.tokenizer.encode(text), model.begin_ids) == their_tokenizer(text)["input_ids"]


def test_greedy_continuations_are_those_of_transformers(directory: Path, theirs: Any, their_tokenizer: Any) -> None:
    model = load_model(directory, torch.float64)
    prompts = [their_tokenizer(text)["input_ids"] for text in TEXTS]
    endless = complete(model.network, prompts, max_new_tokens=NEW_TOKENS, end_ids=[])
    assert len({len(prompt) for prompt in prompts}) > 1 and {len(new) for new in endless} == {NEW_TOKENS}
    for end_ids in ([], [endless[0][5], endless[2][9]]):
        ours = complete(model.network, prompts, max_new_tokens=NEW_TOKENS, end_ids=end_ids)
        alone = [continue_theirs(theirs, encode(their_tokenizer, [text]), end_ids)[0] for text in TEXTS]
        assert ours == alone
        assert ours == continue_theirs(theirs, encode(their_tokenizer, TEXTS), end_ids)
        assert not end_ids or min(map(len, ours)) < NEW_TOKENS


def test_the_command_shows_the_text_that_transformers_decodes(
    directory: Path, theirs: Any, their_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behind the prompt, with the space that the decoder takes away from the beginning of a text."""
    theirs = copy.deepcopy(theirs).float()
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    main(
        f"generate {directory} --prompts {tmp_path}/prompts.txt --temperature 0 --max_new_tokens {NEW_TOKENS} "
        "--device cpu".split()
    )
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for text, record in zip(TEXTS, records, strict=True):
        ids = their_tokenizer(text)["input_ids"]
        (new,) = continue_theirs(theirs, encode(their_tokenizer, [text]), [2, 31])
        assert record["num_tokens"] == len(new)
        whole = their_tokenizer.decode([*ids, *new], skip_special_tokens=True)
        expected = whole[len(their_tokenizer.decode(ids, skip_special_tokens=True)) :]
        assert record["continuation"] == expected.replace("\ufffd", "")  # bytes that make no character

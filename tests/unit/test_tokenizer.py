"""Tokenizers: round trips in both languages, bytes per token, special tokens, and wrong files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from datamodules.tokenizer import Tokenizer, train_tokenizer
from modules.errors import InputError

TEXTS = ["The fox went home. 2024 was a year, wasn't it?", "狐狸回家了，今年是2024年。React组件：很好。"] * 5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 400)


@given(text=st.text())
def test_any_text_comes_back_and_every_byte_is_counted(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.encode_batch([text, ""]) == [ids, []]


@pytest.mark.parametrize("text", [*TEXTS[:2], "naïve café 𠀀 🙂\n\n\ttab", "<|eos|> is only text"])
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids


def test_special_tokens_come_first_and_are_left_out_of_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_id == 1
    assert tokenizer.token_bytes[:3].tolist() == [0, 0, 0]
    assert tokenizer.decode([0, *tokenizer.encode("a 狐"), 1, 2]) == "a 狐"


def test_special_tokens_are_recognised_only_when_asked_for(tokenizer: Tokenizer) -> None:
    text = "a<|eos|>狐<|bos|>"
    a, fox = tokenizer.encode("a"), tokenizer.encode("狐")
    assert tokenizer.encode(text, special_tokens=True) == [*a, 1, *fox, 0]
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.encode(text) == ids and not {0, 1, 2} & set(ids) and tokenizer.decode(ids) == text


def test_training_is_deterministic_and_json_is_kept(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(iter(TEXTS), 400).to_json() == tokenizer.to_json()
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.sha256 == tokenizer.sha256
    assert again.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    assert tokenizer.vocab_size <= 400


def test_digits_are_grouped_as_asked() -> None:
    single, triple = train_tokenizer(["1234"] * 9, 300), train_tokenizer(["1234"] * 9, 300, max_digits=3)
    assert len(single.encode("1234")) == 4
    assert len(triple.encode("1234")) == 2


def test_chinese_words_do_not_merge_with_punctuation(tokenizer: Tokenizer) -> None:
    """So that a question which ends in a Chinese colon is tokenized alike with and without its answer."""
    question = tokenizer.encode("今年是：")
    assert tokenizer.encode("今年是：狐狸")[: len(question)] == question


def test_limits_of_training() -> None:
    with pytest.raises(InputError, match="at least 259"):
        train_tokenizer(TEXTS, 100)
    with pytest.raises(InputError, match="max_digits=4"):
        train_tokenizer(TEXTS, 400, max_digits=4)


def _sentence_piece_like(vocabulary: dict[str, int], special: tuple[str, ...] = ("</s>",)) -> str:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    inner.add_special_tokens(list(special))
    return inner.to_str()


@pytest.mark.parametrize(
    ("special", "eos"),
    [
        (("<|eot_id|>", "<|end_of_text|>"), "<|end_of_text|>"),
        (("<|eot_id|>",), "<|eot_id|>"),
        (("<｜end▁of▁sentence｜>",), "<｜end▁of▁sentence｜>"),
        (("<|im_end|>", "<|endoftext|>"), "<|endoftext|>"),
        (("<eos>", "</s>", "<|eos|>"), "<|eos|>"),
    ],
)
def test_end_of_text_is_found_by_name_and_ours_comes_first(special: tuple[str, ...], eos: str) -> None:
    assert Tokenizer.from_json(_sentence_piece_like({"a": 0}, special)).eos_id == 1 + special.index(eos)


def test_end_of_text_may_be_given_where_its_name_says_nothing(tmp_path: Path) -> None:
    text = _sentence_piece_like({"a": 0}, ("<stop>", "</s>"))
    assert Tokenizer.from_json(text).eos_id == 2
    assert Tokenizer.from_json(text, eos_id=1).eos_id == 1
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    assert Tokenizer.load(tmp_path / "tokenizer.json", eos_id=1).eos_id == 1
    for wrong in (-1, 3):
        with pytest.raises(InputError, match=f"end-of-text token {wrong} is outside .* vocabulary of 3"):
            Tokenizer.from_json(text, eos_id=wrong)


def test_end_of_text_may_be_missing_where_it_is_not_needed() -> None:
    text = _sentence_piece_like({"a": 0}, ("<stop>",))
    loaded = Tokenizer.from_json(text, strict=False)
    assert loaded.encode("a") == [0]
    with pytest.raises(InputError, match="no end-of-text token; the vocabulary needs one of"):
        _ = loaded.eos_id
    with pytest.raises(InputError, match="no end-of-text token"):
        Tokenizer.from_json(text)
    assert Tokenizer.from_json(text, eos_id=7, strict=False).eos_id == 7


def test_special_tokens_by_their_text(tokenizer: Tokenizer) -> None:
    assert [tokenizer.special_id(text) for text in ("<|eos|>", "<|eos|> ", "a", "")] == [1, None, None, None]


def test_tokenizers_come_without_torch() -> None:
    """Every process that prepares data would load it."""
    script = "import sys, datamodules.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_bytes_of_a_vocabulary_that_is_not_byte_level() -> None:
    loaded = Tokenizer.from_json(_sentence_piece_like({"<0x0A>": 0, "\u2581a": 1, "狐": 2}))
    assert loaded.eos_id == 3
    assert loaded.token_bytes.tolist() == [1, 2, 3, 0]


def test_wrong_files_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"missing\.json cannot be read"):
        Tokenizer.load(tmp_path / "missing.json")
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(InputError, match="not a tokenizer"):
        Tokenizer.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        Tokenizer.load(path)
    raw = json.loads(tokenizer.to_json())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != "<|eos|>"]
    raw["model"]["vocab"] = {("<|x|>" if key == "<|eos|>" else key): i for key, i in raw["model"]["vocab"].items()}
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match="no end-of-text token"):
        Tokenizer.load(path)

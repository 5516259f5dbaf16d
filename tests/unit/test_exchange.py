"""Writing Hugging Face directories, and the commands import and export."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors import safe_open
from torch import Tensor

from app.checkpoint import open_weights, read_metadata, read_tokenizer_json
from app.commands import exchange
from datamodules.tokenizer import Tokenizer, train_tokenizer
from modules.config import ModelConfig
from modules.errors import InputError
from modules.hugging_face import open_directory, write_directory
from modules.hugging_face.special_tokens import END_OF_TEXT
from modules.weights import Weights
from tests.unit.hugging_face_helpers import DENSE, edit, refusal, sharded, weights_of, write


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

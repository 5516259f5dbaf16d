"""`growmoe generate` from its command line: shown texts, files of prompts, stop strings, and wrong input."""

import io
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch

from app.checkpoint import write_checkpoint
from app.cli import main
from app.device import choose_device
from app.loading import load_model
from datamodules.tokenizer import Tokenizer, train_tokenizer
from modules.config import ModelConfig
from modules.errors import InputError
from modules.generation import complete
from modules.layers.transformer import Transformer
from modules.weights import Weights
from tests.reference.sentence_pieces import sentence_piece_like

STORY = "the quick fox.\n\nQuestion: 你好🌏？"
Run = Callable[..., str]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Chinese characters are tokens of their own; the emoji is four."""
    return train_tokenizer([STORY.replace("好🌏", "") + " jumps over the lazy dog"] * 3 + ["你，好，"] * 9, 311)


def save(path: Path, network: Transformer, tokenizer_json: str | None, **metadata: Any) -> Path:
    weights = Weights.of(network.state_dict())
    metadata["architecture"] = network.config.to_dict()
    write_checkpoint(path, weights=weights, metadata=metadata, tokenizer_json=tokenizer_json)
    return path


def random_network(vocab_size: int) -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        ModelConfig(vocab_size=vocab_size, dim=16, num_layers=1, num_heads=2, max_seq_len=64, init_std=0.4)
    )


def reciting_network(vocab_size: int, ids: list[int]) -> Transformer:
    """Says each token of `ids` after the one before it, whatever else came before; they must be distinct."""
    assert len(set(ids)) == len(ids)
    network = Transformer(ModelConfig(vocab_size=vocab_size, dim=vocab_size, num_layers=1, num_heads=1, head_dim=2))
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.ones_(network.final_norm.weight)
    torch.nn.init.eye_(network.embedding.weight)
    for before, after in pairwise(ids):
        network.head.weight.data[after, before] = 1.0
    return network


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    path = tmp_path_factory.mktemp("run") / "step-00000001"
    return save(path, random_network(tokenizer.vocab_size), tokenizer.to_json())


@pytest.fixture(scope="module")
def reciter(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Knows one story, and then the end of the text; it begins it when it is asked for nothing."""
    ids = tokenizer.encode(STORY)
    network = reciting_network(tokenizer.vocab_size, [tokenizer.eos_id, *ids])
    network.head.weight.data[tokenizer.eos_id, ids[-1]] = 1.0
    return save(tmp_path_factory.mktemp("run") / "step-00000001", network, tokenizer.to_json())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the verb and returns what it writes."""

    def run(*arguments: Any) -> str:
        capsys.readouterr()
        main(["generate", *map(str, arguments), "--device", "cpu"])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the verb, which must refuse in one line before the model runs, and returns the line."""

    def run(*arguments: Any) -> str:
        def fail(*_: Any, **__: Any) -> None:
            raise AssertionError("the model runs")

        monkeypatch.setattr(Transformer, "forward", fail)
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(["generate", *map(str, arguments)])
        shown = capsys.readouterr()
        assert caught.value.code == 2 and shown.out == ""
        (line,) = shown.err.splitlines()
        return line

    return run


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# -- one prompt --------------------------------------------------------------------------------------------------------


def test_a_continuation_is_shown_as_the_checkpoint_writes_it(run: Run, checkpoint: Path, tokenizer: Tokenizer) -> None:
    shown = run(checkpoint, "the fox 你", "--max_new_tokens", 20, "--temperature", 0)
    model = load_model(checkpoint)
    assert model.begin_ids == model.end_ids == [tokenizer.eos_id]
    prompt = [tokenizer.eos_id, *tokenizer.encode("the fox 你")]
    (ids,) = complete(model.network, [prompt], max_new_tokens=20, end_ids=[tokenizer.eos_id])
    assert shown == tokenizer.decode(ids).replace("\ufffd", "") + "\n"


@pytest.mark.parametrize("cut", [0, 3, len("the quick fox.\n\nQuestion: 你")])
def test_a_story_is_told_to_its_end_from_anywhere(run: Run, reciter: Path, cut: int) -> None:
    """From an empty prompt too."""
    assert run(reciter, STORY[:cut], "--temperature", 0) == STORY[cut:] + "\n"


def test_pieces_are_shown_at_once_and_stay_when_interrupted(
    reciter: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Screen(io.StringIO):
        def __init__(self) -> None:
            super().__init__()
            self.pieces: list[str] = []

        def write(self, text: str) -> int:
            self.pieces.append(text)
            return len(text)

        def flush(self) -> None:
            if "".join(self.pieces).endswith("你好"):
                raise KeyboardInterrupt

    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    with pytest.raises(SystemExit) as caught:
        main(["generate", str(reciter), "the", "--temperature", "0", "--device", "cpu"])
    assert caught.value.code == 130
    assert "".join(screen.pieces) == " quick fox.\n\nQuestion: 你好\n"
    assert {"你", "好"} <= set(screen.pieces)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--stop", "\n\n"], "the quick fox."),
        (["--stop", '["\\n\\n", "fox"]'], "the quick "),
        (["--stop", "zebra", "--stop+", "n: 你"], "the quick fox.\n\nQuestio"),
        (["--stop", "好🌏"], "the quick fox.\n\nQuestion: 你"),
        (["--stop", "？"], STORY[:-1]),
        (["--stop", "？?"], STORY),
        (["--stop", "# no comment"], STORY),
        (["--stop", ""], STORY),
        (["--max_new_tokens", "2", "--stop", " fox"], " ".join(STORY.split(" ")[:2])),
    ],
)
def test_stop_strings_are_cut_off(run: Run, reciter: Path, arguments: list[str], shown: str) -> None:
    assert run(reciter, "", "--temperature", 0, *arguments) == shown + "\n"


def test_a_seed_repeats_and_the_window_is_filled(run: Run, checkpoint: Path, tokenizer: Tokenizer) -> None:
    options = ["--temperature", 1, "--top_k", 50, "--top_p", 0.99]
    first = run(checkpoint, "the fox", *options, "--seed", 1)
    assert first == run(checkpoint, "the fox", *options, "--seed", 1) != run(checkpoint, "the fox", *options)
    assert run(checkpoint, "the fox", "--seed", 5, "--top_k", 1) == run(checkpoint, "the fox", "--temperature", 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_types_of_numbers(run: Run, reciter: Path, dtype: str) -> None:
    weights = load_model(reciter, getattr(torch, dtype)).network.state_dict().values()
    assert {weight.dtype for weight in weights} == {getattr(torch, dtype)}
    assert run(reciter, "", "--temperature", 0, "--dtype", dtype) == STORY + "\n"


def test_special_tokens_are_text_unless_asked_for(run: Run, reciter: Path, tokenizer: Tokenizer) -> None:
    """The end-of-text token lets the story begin again; it is not put in front twice."""
    assert run(reciter, "fox<|eos|>", "--special_tokens", "--temperature", 0) == STORY + "\n"
    assert run(reciter, "<|eos|>", "--special_tokens", "--temperature", 0) == STORY + "\n"
    assert run(reciter, "fox<|eos|>", "--temperature", 0) != STORY + "\n"


# -- files of prompts --------------------------------------------------------------------------------------------------

PROMPTS = ["the quick", "你", "the quick fox.\n\nQuestion: 你好🌏", "", "the fox", "dog"]


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": prompt, "id": 3}, ensure_ascii=bool(i % 2)) for i, prompt in enumerate(PROMPTS)]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


def test_a_file_is_continued_line_by_line(run: Run, reciter: Path, prompt_file: Path, tokenizer: Tokenizer) -> None:
    options = ["--temperature", 0, "--max_new_tokens", 11, "--stop", "🌏", "--batch_size", 4]
    found = records(run(reciter, "--prompts", prompt_file, *options))
    assert [list(record) for record in found] == [["prompt", "continuation", "num_tokens", "finish"]] * len(PROMPTS)
    assert [record["prompt"] for record in found] == PROMPTS
    by_prompt = {record["prompt"]: record for record in found}
    assert by_prompt["你"]["continuation"] == "好" and by_prompt["你"]["finish"] == "stop"
    assert by_prompt["你"]["num_tokens"] == len(tokenizer.encode("好🌏"))
    assert by_prompt[PROMPTS[2]]["continuation"] == "？" and by_prompt[PROMPTS[2]]["finish"] == "end"
    assert by_prompt[PROMPTS[2]]["num_tokens"] == len(tokenizer.encode("？"))
    assert by_prompt[""]["finish"] == "length" and by_prompt[""]["num_tokens"] == 11
    assert STORY.startswith(by_prompt[""]["continuation"])


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
@pytest.mark.parametrize("options", [["--max_new_tokens", 20], []])
def test_each_line_is_continued_as_it_would_be_alone(
    run: Run, checkpoint: Path, tmp_path: Path, batch_size: int, options: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn with seed + number of the line; and where no length is given, each may fill its own window."""
    monkeypatch.setattr("app.commands.generate.BATCHES_SORTED_TOGETHER", 2)
    monkeypatch.setattr("app.commands.generate.DEFAULT_NEW_TOKENS", 40)
    lines = ["the fox", "你好" * 10, "the lazy dog jumps over", "a", "the fox"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    options = [*options, "--temperature", 1.0, "--stop", "e"]
    found = records(run(checkpoint, "--prompts", tmp_path / "prompts.txt", "--batch_size", batch_size, *options))
    alone = [run(checkpoint, line, "--seed", index, *options) for index, line in enumerate(lines)]
    assert [record["prompt"] for record in found] == lines
    assert [record["continuation"] + "\n" for record in found] == alone
    assert len(set(alone)) == len(alone) and {record["finish"] for record in found} >= {"stop"}


def test_prompts_of_similar_length_run_together(
    run: Run, reciter: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    real = Transformer.forward

    def forward(self: Transformer, tokens_BL: torch.Tensor, **options: Any) -> Any:
        shapes.append(tuple(tokens_BL.shape))
        return real(self, tokens_BL, **options)

    monkeypatch.setattr(Transformer, "forward", forward)
    lines = ["你" * count for count in (3, 20, 4, 19, 5)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    run(reciter, "--prompts", tmp_path / "prompts.txt", "--batch_size", 2, "--max_new_tokens", 2)
    assert [shape for shape in shapes if shape[1] > 1] == [(2, 1 + 20), (2, 1 + 5), (1, 1 + 3)]


def test_output_goes_to_a_new_file_when_it_is_whole(
    run: Run, reciter: Path, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--prompts", prompt_file, "--temperature", 0]
    shown = run(reciter, *options)
    out = tmp_path / "out.jsonl"
    assert run(reciter, *options, "--output", out) == ""
    assert out.read_text(encoding="utf-8") == shown and "你好🌏？" in shown
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("app.commands.generate._start", _interrupt)
    with pytest.raises(SystemExit):
        main(["generate", str(reciter), *map(str, options), "--output", str(tmp_path / "other.jsonl")])
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_came_up_in_the_meantime_is_left_alone(
    reciter: Path, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr("app.commands.generate._record", lambda *_: {"written": out.write_text("another's")})
    with pytest.raises(SystemExit) as caught:
        main(["generate", str(reciter), "--prompts", str(prompt_file), "--output", str(out), "--max_new_tokens", "1"])
    assert caught.value.code == 2 and out.read_text() == "another's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


# -- other models ------------------------------------------------------------------------------------------------------


def test_an_imported_model_begins_and_ends_as_its_origin_says(run: Run, tmp_path: Path) -> None:
    tokenizer = sentence_piece_like("byte fallback")
    story = [1, *tokenizer.encode("the lazy fox"), 2]
    network = reciting_network(tokenizer.vocab_size, story)
    network.head.weight.data[story[1], 2] = 1.0  # it would tell its story again
    origin = {"family": "llama", "files": {}, "begin_ids": [1], "end_ids": [0, 2]}
    imported = save(tmp_path / "imported", network, tokenizer.to_json(), origin=origin)
    assert run(imported, "", "--temperature", 0) == "the lazy fox\n"
    assert run(imported, "the", "--temperature", 0) == " lazy fox\n"
    assert run(imported, "the", "--temperature", 0, "--stop", " fox") == " lazy\n"
    model = load_model(imported)
    assert model.tokenizer is not None and model.tokenizer.eos_id == 0
    assert (model.begin_ids, model.end_ids) == ([1], [0, 2])


def test_a_model_that_begins_with_nothing_needs_a_prompt(
    refused: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = sentence_piece_like("metaspace")
    origin = {"family": "qwen2", "files": {}, "begin_ids": [], "end_ids": [2]}
    path = save(tmp_path / "imported", random_network(tokenizer.vocab_size), tokenizer.to_json(), origin=origin)
    assert "a prompt of 0 tokens has nothing to go on from" in refused(path, "")


def test_a_hugging_face_directory_is_read_as_its_reader_reads_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = sentence_piece_like("byte fallback")
    network = reciting_network(tokenizer.vocab_size, [1, *tokenizer.encode("the lazy fox"), 2])
    found = SimpleNamespace(
        family="llama",
        config=network.config,
        weights=Weights.of(network.state_dict()),
        tokenizer_json=tokenizer.to_json(),
        origin={"family": "llama", "files": {}, "begin_ids": [1], "end_ids": [2]},
    )
    reader = ModuleType("modules.hugging_face")
    reader.open_directory = lambda path: found if path == tmp_path else None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modules.hugging_face", reader)
    (tmp_path / "config.json").write_text("{}")
    assert run(tmp_path, "the", "--temperature", 0) == " lazy fox\n"
    assert load_model(tmp_path).metadata == {"architecture": network.config.to_dict(), "origin": found.origin}
    assert not load_model(tmp_path).network.training


def test_a_tokenizer_may_be_given(run: Run, refused: Run, reciter: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    bare = save(tmp_path / "bare", load_model(reciter).network, None)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    assert load_model(bare).tokenizer is None
    shown = run(bare, "the", "--temperature", 0, "--tokenizer", tmp_path / "tokenizer.json")
    assert shown == STORY.removeprefix("the") + "\n"
    line = refused(bare, "the")
    assert "no tokenizer" in line and "--tokenizer FILE" in line


def letters(special: list[str], begin: str = "") -> tokenizers.Tokenizer:
    """a, b and c, and special tokens behind them, of which one may stand in front of every text."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "c": 2}, []))
    inner.decoder = tokenizers.decoders.Fuse()
    inner.add_special_tokens(special)
    if begin:
        template = {"single": f"{begin} $A", "special_tokens": [(begin, inner.token_to_id(begin))]}
        inner.post_processor = tokenizers.processors.TemplateProcessing(**template)
    return inner


def test_a_given_tokenizer_brings_its_begin_and_end(run: Run, refused: Run, tmp_path: Path) -> None:
    """Also where the model came from elsewhere with a tokenizer of its own."""
    network = reciting_network(8, [6, 0, 1, 5, 2])
    origin = {"family": "llama", "files": {}, "begin_ids": [3], "end_ids": [4]}
    path = save(tmp_path / "model", network, letters(["<s>", "</s>"], "<s>").to_str(), origin=origin)
    file = tmp_path / "tokenizer.json"
    file.write_text(letters(["<x>", "<y>", "</s>", "<b>"], "<b>").to_str(), encoding="utf-8")
    model = load_model(path, tokenizer_file=file)
    assert (model.begin_ids, model.end_ids) == ([6], [5])
    assert run(path, "", "--tokenizer", file, "--temperature", 0) == "ab\n"
    file.write_text(letters(["<s>", "</s>", *"123456"]).to_str(), encoding="utf-8")
    line = refused(path, "a", "--tokenizer", file)
    assert "gives ids up to 10, and the model's vocabulary has 8 entries" in line


@pytest.mark.parametrize(
    ("special", "end_ids", "shown"),
    [
        (["<b>"], [], "abcabc"),  # only length ends it
        (["<b>"], [2], "ab"),
        (["</s>"], [], "abcabc"),  # a name is no reason to end what its model does not end
        (["</s>"], [7, 2], "ab"),  # 7 is a token of the model, and none of the tokenizer
    ],
)
def test_a_model_from_elsewhere_needs_no_end_of_text(
    run: Run, tmp_path: Path, special: list[str], end_ids: list[int], shown: str
) -> None:
    network = reciting_network(8, [0, 1, 2])
    network.head.weight.data[0, 2] = 1.0
    origin = {"family": "llama", "files": {}, "begin_ids": [], "end_ids": end_ids}
    path = save(tmp_path / "model", network, letters(special).to_str(), origin=origin)
    assert run(path, "c", "--temperature", 0, "--max_new_tokens", 6) == shown + "\n"
    assert run(path, "a", "--temperature", 0, "--max_new_tokens", 1) == "b\n"


def test_a_model_trained_here_needs_an_end_of_text(refused: Run, tmp_path: Path) -> None:
    path = save(tmp_path / "model", random_network(8), letters(["<b>"]).to_str())
    assert "no end-of-text token; the vocabulary needs one of" in refused(path, "a")


def test_a_stop_string_may_be_a_special_token(run: Run, tmp_path: Path) -> None:
    network = reciting_network(8, [0, 1, 5, 2, 3])
    text = letters(["</s>", "<x>", "<|im_end|>"]).to_str()
    path = save(tmp_path / "model", network, text)
    assert run(path, "a", "--temperature", 0) == "bc\n"
    assert run(path, "a", "--temperature", 0, "--stop", "<|im_end|>") == "b\n"
    assert run(path, "a", "--temperature", 0, "--stop", "c", "--stop+", "<|im_end|>") == "b\n"
    assert run(path, "a", "--temperature", 0, "--stop", "<|im_end|>c") == "bc\n"  # more than the token
    assert run(path, "a", "--temperature", 0, "--stop", "<x>") == "bc\n"


# -- wrong input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "neither given; give a text to continue, or --prompts FILE"),
        (["fox", "--prompts", "PROMPTS"], "both given"),
        (["the", "fox"], "'fox' is the second); put quotes around a prompt"),
        (["fox", "--output", "out.jsonl"], "output=out.jsonl is for a file of prompts"),
        (["--prompts", "PROMPTS", "--output", "PROMPTS"], "exists, and nothing is ever overwritten"),
        (["--prompts", "PROMPTS", "--output", "no/such/out.jsonl"], "folder that does not exist; create no/such first"),
        (["--prompts", "nowhere.txt"], "nowhere.txt cannot be read: No such file"),
        (["--prompts", "nowhere.csv"], "neither .txt nor .jsonl"),
        (["fox", "--top_p", "2"], "top_p=2.0"),
        (["fox", "--temperature", "-1"], "temperature=-1.0"),
        (["fox", "--max_new_tokens", "0"], "max_new_tokens=0"),
        (["fox", "--max_new_tokens", "9999"], "max_seq_len=64; set max_new_tokens <= "),
        (["fox " * 80], "max_seq_len=64; shorten the prompt"),
        (["--prompts", "PROMPTS", "--batch_size", "0"], "batch_size=0"),
        (["fox", "--seed", "-1"], "seed=-1 is out of range"),
        (["fox", "--dtype", "int8"], "dtype"),
        (["fox", "--device", "abacus"], "device='abacus'"),
        (["fox", "--tokenizer", "nowhere.json"], "nowhere.json cannot be read"),
        (["fo\udcffx"], "'\\udcff', which is half a character"),
    ],
)
def test_wrong_arguments(refused: Run, checkpoint: Path, prompt_file: Path, arguments: list[str], words: str) -> None:
    line = refused(checkpoint, *(str(prompt_file) if word == "PROMPTS" else word for word in arguments))
    assert words in line


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"", "p.txt is empty"),
        ("p.jsonl", b"\n \n", "p.jsonl is empty"),
        ("p.txt", b"a\xff", "p.txt is not UTF-8 text (byte 1)"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b"\n', "p.jsonl line 2: not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"text": "b"}\n', 'p.jsonl line 3: \'{"text": "b"}\' is no object'),
        ("p.jsonl", b'{"prompt": 7}', "p.jsonl line 1: "),
        pytest.param("p.jsonl", b"\n" + b"[" * 100_000 + b"]" * 100_000, "p.jsonl line 2: not JSON", id="deep"),
        ("p.jsonl", b'["prompt"]', "p.jsonl line 1: "),
        ("p.jsonl", b'{"prompt": "\\ud800"}', "p.jsonl line 1: the prompt holds '\\ud800'"),
        ("p.txt", b"fox\n\n" + b"fox " * 80, "p.txt line 3: a prompt of 83 tokens"),
    ],
)
def test_wrong_files_of_prompts(
    refused: Run, checkpoint: Path, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert words in refused(checkpoint, "--prompts", tmp_path / name)


def test_wrong_models(refused: Run, checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    line = refused(tmp_path, "fox")
    assert "neither manifest.json of a checkpoint" in line and "nor config.json of a Hugging Face model" in line
    other = train_tokenizer(["the quick fox jumps over the lazy dog zebra"] * 5, 400)
    (tmp_path / "tokenizer.json").write_text(other.to_json(), encoding="utf-8")
    path = save(tmp_path / "small", random_network(270), None)
    assert "the model's vocabulary has 270 entries" in refused(
        path, "the fox", "--tokenizer", tmp_path / "tokenizer.json"
    )
    path = save(tmp_path / "larger", random_network(270), other.to_json())
    assert "outside the model's vocabulary of 270" in refused(path, "the fox")
    origin = {"begin_ids": [], "end_ids": [5000]}
    path = save(tmp_path / "foreign", random_network(270), other.to_json(), origin=origin)
    assert "foreign: end-of-text token 5000 is outside the model's vocabulary of 270" in refused(path, "the fox")


def test_unusable_device_is_an_input_error() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="device='abacus'"):
        choose_device("abacus")

"""`growmoe prepare`: every kind of input, what is dropped, the split, and wrong arguments."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.commands.prepare import parse_inputs, prepare
from datamodules.documents import ReadOptions, read_documents
from datamodules.manifest import read_manifest
from datamodules.order import hash_fraction
from datamodules.shards import open_split
from datamodules.tokenizer import Tokenizer, train_tokenizer
from modules.errors import InputError

TEXTS = [f"Story {number} of a fox. 故事{number}。" for number in range(200)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """One folder with the texts in four kinds of file."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    rows = [json.dumps({"text": text, "id": 1}) for text in TEXTS]
    (folder / "a.jsonl").write_text("\n".join(rows[:50]) + "\n\n")
    (folder / "deep/b.ndjson.gz").write_bytes(gzip.compress("\n".join(rows[50:100]).encode()))
    pq.write_table(pa.table({"id": [1] * 99, "text": TEXTS[100:199]}), folder / "c.parquet", row_group_size=10)
    (folder / "d.txt").write_text(TEXTS[199])
    (folder / "ignored.csv").write_text("x")
    return folder


def _prepare(tmp_path: Path, inputs: list[str], **options: Any) -> Path:
    output = tmp_path / options.pop("name", "out")
    prepare(inputs, output=output, **{"train_tokenizer": 300, "validation_fraction": 0.2, **options})
    return output


def _texts(root: Path, corpus: str) -> dict[str, list[str]]:
    manifest, tokenizer = read_manifest(root), Tokenizer.load(root / "tokenizer.json")
    texts = {}
    for split in ("train", "validation"):
        stream = open_split(root, manifest, corpus, split)
        documents: list[list[int]] = [[]]
        for token in stream.read(0, len(stream)).tolist():
            if token == tokenizer.eos_id:
                documents.append([])
            else:
                documents[-1].append(token)
        assert not documents.pop()
        texts[split] = [tokenizer.decode(ids) for ids in documents]
    return texts


def test_a_folder_of_many_kinds(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = _texts(_prepare(tmp_path, [f"en={corpus}"]), "en")
    assert sorted(texts["train"] + texts["validation"]) == sorted(TEXTS)
    assert 20 <= len(texts["validation"]) <= 60
    table = capsys.readouterr().out
    assert "documents" in table and "bytes per token" in table and str(len(texts["train"])) in table


def test_the_split_depends_on_the_text_alone(corpus: Path, tmp_path: Path) -> None:
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("\n".join(json.dumps({"text": text}) for text in reversed([*TEXTS, *TEXTS[:50]])))
    first, second = (
        _texts(_prepare(tmp_path, [f"en={path}"], name=path.name + "-out"), "en") for path in (corpus, shuffled)
    )
    assert set(first["validation"]) == set(second["validation"])
    assert not set(second["train"]) & set(second["validation"])
    assert all((hash_fraction(text) < 0.2) == (text in first["validation"]) for text in TEXTS)


def test_several_corpora_inputs_and_a_given_tokenizer(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(train_tokenizer(TEXTS, 320).to_json())
    inputs = [f"web:en={corpus}/*.jsonl", f"web:en={corpus}/**/*.ndjson.gz", f"zh={corpus}/c.parquet"]
    root = _prepare(tmp_path, inputs, tokenizer=path, train_tokenizer=None, num_workers=2)
    manifest = read_manifest(root)
    assert {name: info.language for name, info in manifest.corpora.items()} == {"web": "en", "zh": "zh"}
    assert (root / "tokenizer.json").read_text() == path.read_text()
    texts = _texts(root, "web")
    assert sorted(texts["train"] + texts["validation"]) == sorted(TEXTS[:100])


def test_a_data_set_in_hub_form_is_streamed(tmp_path: Path) -> None:
    folder = tmp_path / "org/name"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"body": TEXTS}), folder / "train-00000-of-00001.parquet")
    root = _prepare(tmp_path, [f"en=hub:{folder}@train"], text_column="body")
    texts = _texts(root, "en")
    assert sorted(texts["train"] + texts["validation"]) == sorted(TEXTS)


def test_units_of_text_files(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("one\ntwo\n\n\nthree\n")
    expected = {"file": ["one\ntwo\n\n\nthree\n"], "paragraph": ["one\ntwo\n", "three\n"]}
    expected["line"] = ["one\n", "two\n", "three\n"]
    for unit, texts in expected.items():
        assert list(read_documents(str(path), ReadOptions(text_unit=unit), Counter())) == texts


def test_bad_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [json.dumps({"text": text}).encode() for text in ["good", "", "  \n", "a\0b", "\ud800", "x" * 50]]
    rows += [b'{"text": "\xff"}', b'{"text": 3}', b'{"text": null}', b"[1]", b"{torn", b'{"text": "also good"}']
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(rows))
    dropped: Counter[str] = Counter()
    options = ReadOptions(max_document_bytes=40)
    assert list(read_documents(str(tmp_path / "x.jsonl"), options, dropped)) == ["good", "also good"]
    assert dropped == {"empty": 3, "NUL": 1, "invalid UTF-8": 2, "too long": 1, "malformed": 3}


def test_bad_strings_in_parquet_are_dropped_and_counted(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff", b"a\0", b"", None], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers(), null_count=1)
    pq.write_table(pa.table({"text": strings}), tmp_path / "x.parquet")
    dropped: Counter[str] = Counter()
    assert list(read_documents(str(tmp_path / "x.parquet"), ReadOptions(), dropped)) == ["good"]
    assert dropped == {"invalid UTF-8": 1, "NUL": 1, "empty": 2}


def test_a_giant_line_is_not_read_into_memory_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("short\n" + "x" * 1000 + "\nlast")
    dropped: Counter[str] = Counter()
    options = ReadOptions(text_unit="line", max_document_bytes=100)
    assert list(read_documents(str(path), options, dropped)) == ["short\n", "last"]
    assert dropped == {"too long": 1}


def test_what_was_dropped_is_in_the_manifest_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in [*TEXTS, ""]))
    root = _prepare(tmp_path, [f"en={path}"])
    assert read_manifest(root).corpora["en"].dropped == {"empty": 1}
    assert "1 empty" in capsys.readouterr().out


def test_too_many_bad_documents_stop_it(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS) + "\n{torn" * 100)
    with pytest.raises(InputError, match=r"33\.3% of the documents would be dropped \(100 malformed\)"):
        _prepare(tmp_path, [f"en={path}"])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x.jsonl"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "no inputs"),
        (["books.jsonl"], "is not LANGUAGE=WHERE"),
        (["=x"], "is not LANGUAGE=WHERE"),
        (["e2=x"], "is not LANGUAGE=WHERE"),
        (["en="], "is not LANGUAGE=WHERE"),
        (["en=nowhere/*.txt"], "matches no file"),
        (["en=nowhere.txt"], "matches no file"),
        (["web:en=hub:a/b", "web:zh=hub:c/d"], "is given in 'en' and 'zh'"),
    ],
)
def test_wrong_inputs(inputs: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_inputs(inputs)


def test_unknown_kinds_and_broken_files(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("x")
    with pytest.raises(InputError, match="no known kind"):
        parse_inputs([f"en={tmp_path / 'x.csv'}"])
    for name, content in (("x.parquet", b"PAR1 not"), ("x.jsonl.gz", b"not gzip")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="cannot be read"):
            list(read_documents(str(tmp_path / name), ReadOptions(), Counter()))


def test_missing_columns_say_what_there_is(corpus: Path) -> None:
    for name in ("a.jsonl", "c.parquet"):
        with pytest.raises(InputError, match=r"no column 'body', only .*; set text_column"):
            list(read_documents(str(corpus / name), ReadOptions(text_column="body"), Counter()))
    with pytest.raises(InputError, match="is int64, not text"):
        list(read_documents(str(corpus / "c.parquet"), ReadOptions(text_column="id"), Counter()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_tokenizer": None}, "neither given"),
        ({"tokenizer": Path("x.json")}, "both given"),
        ({"validation_fraction": 0}, "validation_fraction=0"),
        ({"validation_fraction": 0.9}, "validation_fraction=0.9"),
        ({"num_workers": 0}, "num_workers=0"),
        ({"max_document_bytes": 0}, "max_document_bytes=0"),
        ({"max_dropped_fraction": 2}, "max_dropped_fraction=2"),
        ({"train_tokenizer": 10}, "at least 259"),
        ({"validation_fraction": 1e-9}, "no document in split 'validation'"),
        ({"train_tokenizer": None, "tokenizer": Path("no.json")}, r"no\.json cannot be read"),
    ],
)
def test_wrong_options_leave_nothing_behind(
    corpus: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        _prepare(tmp_path, [f"en={corpus}"], **options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def test_an_existing_output_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        _prepare(tmp_path, [f"en={corpus}"], name="in")

"""Token shards: what is written comes back, in any number of files, and every damage is found at the start."""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from datamodules.manifest import hash_file, read_manifest
from datamodules.shard_writer import ShardWriter
from datamodules.shards import TokenStream, check_tokenizer, open_split
from datamodules.tokenizer import Tokenizer, train_tokenizer
from modules.errors import InputError

DOCUMENTS = [
    ("validation" if i % 5 == 0 else "train", f"document {i} 文档{i} " + "word 词" * (i % 7)) for i in range(60)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([text for _, text in DOCUMENTS], 300)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    root = tmp_path_factory.mktemp("shards") / "prepared"
    with ShardWriter(root) as writer:
        writer.add_corpus("en", "en", DOCUMENTS)
        writer.finish(tokenizer, extra={"note": 1})
    return root


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def _shard(root: Path) -> Path:
    return root / "en/train/data-00000-of-00001.arrow"


def _write_shard(path: Path, batches: list[list[list[int]]], dtype: pa.DataType) -> None:
    with pa.ipc.new_stream(str(path), pa.schema([("tokens", pa.list_(dtype))])) as writer:
        for rows in batches:
            writer.write_batch(pa.record_batch([pa.array(rows, pa.list_(dtype))], names=["tokens"]))


def _accept(root: Path, **values: int) -> None:
    """Makes the manifest agree with a changed shard, so that only the tokens can be found wrong."""
    manifest = json.loads((root / "manifest.json").read_text())
    split = manifest["corpora"]["en"]["splits"]["train"]
    split.update(values)
    split["files"][0].update(bytes=_shard(root).stat().st_size, sha256=hash_file(_shard(root)))
    (root / "manifest.json").write_text(json.dumps(manifest))


def test_tokens_are_the_documents_end_to_end(prepared: Path, tokenizer: Tokenizer) -> None:
    manifest = read_manifest(prepared)
    assert manifest.extra == {"note": 1} and manifest.dtype == "uint16"
    for split in ("train", "validation"):
        texts = [text for where, text in DOCUMENTS if where == split]
        expected = [token for text in texts for token in (*tokenizer.encode(text), tokenizer.eos_id)]
        stream = open_split(prepared, manifest, "en", split, verify=True)
        info = manifest.corpora["en"].splits[split]
        assert stream.read(0, len(stream)).tolist() == expected
        assert (info.documents, info.tokens, info.max_token_id) == (len(texts), len(expected), max(expected))
        assert info.bytes == sum(len(text.encode()) for text in texts) == tokenizer.token_bytes[expected].sum()


def test_shards_are_an_ordinary_data_set_of_documents(prepared: Path, tokenizer: Tokenizer) -> None:
    rows = datasets.load_from_disk(str(prepared / "en/train"))
    assert rows.features["tokens"].feature.dtype == "uint16"
    assert len(rows) == 48
    assert rows[0]["tokens"] == [*tokenizer.encode(DOCUMENTS[1][1]), tokenizer.eos_id]


def test_writing_in_several_processes_gives_the_same_tokens(
    prepared: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with ShardWriter(tmp_path / "again") as writer:
        writer.add_corpus("en", "en", DOCUMENTS)
        manifest = writer.finish(tokenizer, num_workers=2)
    first, second = (open_split(root, manifest, "en", "train") for root in (prepared, tmp_path / "again"))
    assert first.read(0, len(first)).tolist() == second.read(0, len(second)).tolist()


def test_a_large_vocabulary_is_stored_in_32_bits(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "vocab_size", 70_000)
    with ShardWriter(tmp_path / "wide") as writer:
        writer.add_corpus("en", "en", DOCUMENTS)
        assert writer.finish(Tokenizer.from_json(tokenizer.to_json())).dtype == "uint32"
    rows = datasets.load_from_disk(str(tmp_path / "wide/en/train"))
    assert rows.features["tokens"].feature.dtype == "uint32"


def test_a_stream_runs_over_batches_and_files(tmp_path: Path) -> None:
    """Every window of a stream of five record batches, one of them empty, in two files, against plain slicing."""
    numbers = iter(range(1000))
    shapes = [[[3, 1], [], [7]], [[2, 2], [5]]]
    paths = [tmp_path / "a.arrow", tmp_path / "b.arrow"]
    for path, shape in zip(paths, shapes, strict=True):
        _write_shard(path, [[[next(numbers) for _ in range(n)] for n in rows] for rows in shape], pa.uint32())
    stream = TokenStream(paths, vocab_size=1000)
    assert len(stream) == 20
    for start in range(20):
        for length in range(1, 21 - start):
            assert stream.read(start, length).tolist() == list(range(start, start + length))
    sent = pickle.loads(pickle.dumps(stream))
    assert sent.read(0, 20).tolist() == list(range(20))
    assert len(pickle.dumps(stream)) < 1000


def test_scan_finds_a_wrong_id_wherever_it_is(tmp_path: Path) -> None:
    tokens = np.zeros(5000, dtype=np.uint32)
    tokens[3210] = 70_000
    path = tmp_path / "x.arrow"
    _write_shard(path, [[tokens[:3000].tolist()], [tokens[3000:].tolist()]], pa.uint32())
    with pytest.raises(InputError, match=rf"{path} offset 3210: token id 70000 >= vocabulary 65536"):
        TokenStream([path], 65_536).scan()


def test_scan_reads_no_more_than_its_limit_and_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.shards._SCAN_PIECE", 10)
    path = tmp_path / "x.arrow"
    _write_shard(path, [[[0] * 1000]], pa.uint16())
    stream = TokenStream([path], 9)
    ranges: list[tuple[int, int]] = []
    monkeypatch.setattr(stream, "_scan_range", lambda start, stop: ranges.append((start, stop)) or 0)
    stream.scan(limit=40)
    assert ranges == [(0, 10), (250, 260), (500, 510), (750, 760)]


def test_a_token_outside_the_vocabulary_is_found_at_the_start(copy: Path) -> None:
    tokens = open_split(copy, read_manifest(copy), "en", "train")
    rows = [tokens.read(0, len(tokens)).tolist()]
    rows[0][17] = 40_000
    _write_shard(_shard(copy), [rows], pa.uint16())
    _accept(copy)
    with pytest.raises(InputError, match=r"shard .*train.* offset 17: token id 40000 >= vocabulary"):
        open_split(copy, read_manifest(copy), "en", "train")
    _accept(copy, max_token_id=40_000)
    with pytest.raises(InputError, match="token id 40000 >= vocabulary"):
        open_split(copy, read_manifest(copy), "en", "train")


def test_truncated_and_missing_shards(copy: Path) -> None:
    data = _shard(copy).read_bytes()
    _shard(copy).write_bytes(data[:-100])
    with pytest.raises(InputError, match=rf"has {len(data) - 100} bytes, manifest.json says {len(data)}"):
        open_split(copy, read_manifest(copy), "en", "train")
    _accept(copy)
    with pytest.raises(InputError, match=r"cannot be read|tokens in split"):
        open_split(copy, read_manifest(copy), "en", "train")
    _shard(copy).unlink()
    with pytest.raises(InputError, match="is missing"):
        open_split(copy, read_manifest(copy), "en", "train")


def test_a_flipped_bit_is_found_by_verification(copy: Path) -> None:
    data = bytearray(_shard(copy).read_bytes())
    data[len(data) // 2] ^= 1
    _shard(copy).write_bytes(data)
    open_split(copy, read_manifest(copy), "en", "train")
    with pytest.raises(InputError, match="sha256 mismatch in shard"):
        open_split(copy, read_manifest(copy), "en", "train", verify=True)


def test_unknown_corpora_and_splits_say_what_exists(copy: Path) -> None:
    manifest = read_manifest(copy)
    with pytest.raises(InputError, match=r"no corpus 'fr'.*it holds en"):
        open_split(copy, manifest, "fr", "train")
    del manifest.corpora["en"].splits["validation"]
    with pytest.raises(InputError, match=r"no split 'validation', only train"):
        open_split(copy, manifest, "en", "validation")
    _accept(copy, tokens=0)
    with pytest.raises(InputError, match="is empty in split 'train'"):
        open_split(copy, read_manifest(copy), "en", "train")


def test_another_tokenizer_is_refused(prepared: Path, tokenizer: Tokenizer) -> None:
    check_tokenizer(prepared, read_manifest(prepared), tokenizer)
    with pytest.raises(InputError, match="made with"):
        check_tokenizer(prepared, read_manifest(prepared), train_tokenizer(["other"], 300))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1}', '{"format": 1, "corpora": []}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="not a prepared folder"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"damaged.*growmoe prepare"):
        read_manifest(tmp_path)


def test_an_existing_output_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(InputError, match="exists already"):
        ShardWriter(tmp_path / "here")


def test_a_failed_writer_leaves_nothing_behind(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, str]]:
        yield "train", "text"
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"), ShardWriter(tmp_path / "out") as writer:
        writer.add_corpus("en", "en", broken())
    assert list(tmp_path.iterdir()) == []


def test_wrong_corpora_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out") as writer:
        with pytest.raises(InputError, match="no folder name"):
            writer.add_corpus("../en", "en", DOCUMENTS)
        with pytest.raises(InputError, match="no document in split 'validation'"):
            writer.add_corpus("x", "en", [("train", "text")])
        writer.add_corpus("en", "en", DOCUMENTS)
        with pytest.raises(InputError, match="given twice"):
            writer.add_corpus("en", "en", DOCUMENTS)


def test_training_texts_can_be_sampled(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out") as writer:
        writer.add_corpus("en", "en", DOCUMENTS)
        everything, some = list(writer.texts()), list(writer.texts(limit_bytes=600))
        assert everything == [text for split, text in DOCUMENTS if split == "train"]
        assert 0 < len(some) < len(everything)
        assert some == list(writer.texts(limit_bytes=600))

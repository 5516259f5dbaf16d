"""Batches: what they hold, that every rank and worker sees the right samples, and that a run is taken up again."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import BilingualText
from datamodules.manifest import read_manifest
from datamodules.shard_writer import ShardWriter
from datamodules.shards import open_split
from datamodules.tokenizer import train_tokenizer
from datamodules.windows import GlobalBatchSampler, deal_evenly, num_repeated, number_documents
from modules.errors import InputError

SEQ_LEN = 16


def _documents(language: str, count: int) -> Iterator[tuple[str, str]]:
    words = "fox dog bird home went red" if language == "en" else "狐狸 小狗 鸟儿 回家 去了 红色"
    for number in range(count):
        picked = [words.split()[(number * 7 + place * place) % 6] for place in range(number % 9)]
        yield "validation" if number % 4 == 0 else "train", f"{number} {' '.join(picked)}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three corpora, two of them English."""
    root = tmp_path_factory.mktemp("text") / "prepared"
    with ShardWriter(root) as writer:
        for name, language, count in (("web", "en", 300), ("books", "en", 90), ("zh", "zh", 200)):
            writer.add_corpus(name, language, _documents(language, count))
        writer.finish(train_tokenizer(writer.texts(), 320))
    return root


def _attach(data: BilingualText, *, rank: int = 0, world: int = 1, steps: int = 20, accumulate: int = 1) -> Any:
    """A stand-in for the trainer: place in the world, length of the run, and finished micro-batches."""
    total = SimpleNamespace(processed=data._resumed_batches)
    progress = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total)))
    data.trainer = SimpleNamespace(
        strategy=SimpleNamespace(world=SimpleNamespace(data_rank=rank, data_ranks=world)),
        world_size=world,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        global_step=data._resumed_batches // accumulate,
        fit_loop=progress,
        state=SimpleNamespace(fn=None),
    )
    return total


def _module(root: Path, **options: Any) -> BilingualText:
    data = BilingualText(root, **{"seq_len": SEQ_LEN, "batch_size": 4, **options})
    data.setup("fit")
    return data


def _global_batches(root: Path, world: int, workers: int, steps: int, state: dict[str, Any] | None = None) -> list:
    """The token batches of every step, put together from all ranks; 8 samples a step."""
    loaders = []
    for rank in range(world):
        data = BilingualText(root, seq_len=SEQ_LEN, batch_size=8 // world, num_workers=workers)
        if state is not None:
            data.load_state_dict(state)
        data.setup("fit")
        _attach(data, rank=rank, world=world, steps=steps)
        loaders.append(data.train_dataloader())
    return [torch.cat([batch["tokens"] for batch in parts]) for parts in zip(*loaders, strict=True)]


# What a batch holds


def _naive(tokens: list[int], eos: int) -> tuple[list[int], list[int]]:
    """Documents and positions of input tokens, one at a time."""
    documents, positions = [], []
    document = position = 0
    for place, token in enumerate(tokens):
        if token == eos:
            document, position = document + (place > 0), 0
        documents.append(document)
        positions.append(position)
        position += 1
    return documents, positions


@given(rows=st.lists(st.lists(st.integers(0, 2), min_size=9, max_size=9), min_size=1, max_size=4))
def test_documents_and_positions_match_counting(rows: list[list[int]]) -> None:
    documents_BL, positions_BL = number_documents(np.array(rows), eos_id=1)
    for row, documents, positions in zip(rows, documents_BL.tolist(), positions_BL.tolist(), strict=True):
        assert (documents, positions) == _naive(row, eos=1)


def test_batches_match_a_naive_reading_of_the_shards(root: Path) -> None:
    data = _module(root, weights={"web": 0.5, "books": 0.2, "zh": 0.3})
    _attach(data, steps=30)
    manifest, names = read_manifest(root), ["web", "books", "zh"]
    streams = {name: open_split(root, manifest, name, "train") for name in names}
    flat = {name: stream.read(0, len(stream)).tolist() for name, stream in streams.items()}
    sizes = data.tokenizer.token_bytes.tolist()
    assert data._train is not None
    index = 0
    for batch in data.train_dataloader():
        assert {key: value.dtype for key, value in batch.items()} == dict.fromkeys(batch, torch.int64)
        for row in range(4):
            source, _, window = data._train.order.locate(index)
            tokens = flat[names[source]][window * SEQ_LEN : (window + 1) * SEQ_LEN + 1]
            documents, positions = _naive(tokens[:-1], data.tokenizer.eos_id)
            assert batch["tokens"][row].tolist() == tokens
            assert batch["document_ids"][row].tolist() == documents
            assert batch["position_ids"][row].tolist() == positions
            assert batch["target_bytes"][row] == sum(sizes[token] for token in tokens[1:])
            assert data.languages[batch["language"][row]] == manifest.corpora[names[source]].language
            index += 1
    assert index == 120


def test_document_borders_are_the_rows_of_the_data_set(root: Path) -> None:
    """The end token marks a border exactly where the list offsets say so."""
    import datasets

    rows = datasets.load_from_disk(str(root / "web/train"))["tokens"]
    eos = BilingualText(root).tokenizer.eos_id
    assert all(row[-1] == eos and eos not in row[:-1] for row in rows)


def test_without_document_mask_a_window_is_one_document(root: Path) -> None:
    data = _module(root, document_mask=False)
    _attach(data)
    batch = next(iter(data.train_dataloader()))
    assert not batch["document_ids"].any()
    assert torch.equal(batch["position_ids"], torch.arange(SEQ_LEN).expand(4, -1))


def test_target_bytes_add_up_to_the_text(root: Path) -> None:
    """Over a whole validation split, target bytes are the bytes of the text the windows cover."""
    data = _module(root, weights={"zh": 1})
    stream = open_split(root, data.manifest, "zh", "validation")
    (loader,) = data.val_dataloader()
    counted = sum(int(batch["target_bytes"].sum()) for batch in loader)
    covered = stream.read(0, (len(stream) - 1) // SEQ_LEN * SEQ_LEN + 1)
    assert counted == data.tokenizer.token_bytes[covered[1:]].sum()
    whole = data.tokenizer.token_bytes[stream.read(0, len(stream))].sum()
    assert whole == data.manifest.corpora["zh"].splits["validation"].bytes
    assert whole - counted < (SEQ_LEN + 1) * data.tokenizer.token_bytes.max()


# Who reads what


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 2), (2, 0), (4, 0), (2, 2)])
def test_ranks_and_workers_do_not_change_a_step(root: Path, world: int, workers: int) -> None:
    expected, found = _global_batches(root, 1, 0, steps=12), _global_batches(root, world, workers, steps=12)
    assert len(found) == 12
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("finished", [1, 5, 11])
@pytest.mark.parametrize("world", [1, 2])
def test_any_position_is_taken_up_again(root: Path, finished: int, world: int) -> None:
    """Also by another number of ranks than the one that saved."""
    expected = _global_batches(root, 1, 0, steps=12)
    saved = _module(root, batch_size=8)
    _attach(saved).processed = finished
    state = json.loads(json.dumps(saved.state_dict()))
    assert state["consumed_samples"] == 8 * finished
    rest = _global_batches(root, world, 0, steps=12, state=state)
    assert all(torch.equal(a, b) for a, b in zip(expected[finished:], rest, strict=True))


def test_consumed_samples_add_up_over_resumed_parts_of_another_size(root: Path) -> None:
    first = _module(root)
    _attach(first).processed = 10
    second = _module(root, batch_size=16)
    second.load_state_dict(first.state_dict())
    total = _attach(second, world=2)
    assert second.consumed_samples == 40
    total.processed = 13
    assert second.consumed_samples == 40 + 3 * 16 * 2


def test_the_length_is_that_of_the_whole_run(root: Path) -> None:
    data = _module(root)
    data.load_state_dict({**data.state_dict(), "consumed_samples": 16, "finished_batches": 4})
    _attach(data, steps=10, accumulate=2)
    loader = data.train_dataloader()
    assert len(loader) == 20
    assert len(list(loader)) == 16


def test_sampler_indices() -> None:
    sampler = GlobalBatchSampler(first_sample=100, first_batch=2, num_batches=4, batch_size=2, rank=1, world=3)
    assert list(sampler) == [[102, 103], [108, 109]]


@given(num_samples=st.integers(1, 200), batch_size=st.integers(1, 9), world=st.integers(1, 8))
def test_validation_is_dealt_without_loss(num_samples: int, batch_size: int, world: int) -> None:
    ranks = [deal_evenly(num_samples, batch_size, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    sizes = {len(batch) for batches in ranks for batch in batches}
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    counted = [index for batches in ranks for batch in batches for index in batch]
    assert set(counted) == set(range(num_samples))
    assert len(counted) == num_samples + num_repeated(num_samples, batch_size, world)
    if world == 1 or (batch_size > 1 and num_samples >= batch_size * world):
        assert len(counted) == num_samples


class _Recorder(LightningModule):
    """Records the tokens of every step; its one weight makes the order matter to the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        self.seen.append(batch["tokens"].clone())
        return self.weight * batch["tokens"].float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-4)


def _fit(root: Path, folder: Path, steps: int, checkpoint: str | None = None) -> _Recorder:
    module = _Recorder()
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        accumulate_grad_batches=2,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    data = BilingualText(root, seq_len=SEQ_LEN, batch_size=4, num_workers=0)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
    assert data.consumed_samples == steps * 2 * 4
    return module


def test_a_run_that_lightning_resumes_sees_what_an_unbroken_one_sees(root: Path, tmp_path: Path) -> None:
    whole = _fit(root, tmp_path / "whole", 6)
    resumed = _fit(root, tmp_path / "resumed", 6, str(tmp_path / "whole/step=2.ckpt"))
    assert len(whole.seen) == 12
    assert torch.equal(torch.stack(resumed.seen), torch.stack(whole.seen[4:]))
    assert torch.equal(resumed.weight, whole.weight)
    again = _fit(root, tmp_path / "again", 6, str(tmp_path / "resumed/step=5.ckpt"))
    assert torch.equal(torch.stack(again.seen), torch.stack(whole.seen[10:]))


# Validation and identity


def test_validation_is_by_language_and_fixed(root: Path) -> None:
    data = _module(root)
    assert data.languages == ["en", "zh"]
    english, chinese = data.val_dataloader()
    assert {int(i) for batch in english for i in batch["language"]} == {0}
    assert {int(i) for batch in chinese for i in batch["language"]} == {1}
    expected = []
    for name in ("web", "books"):
        stream = open_split(root, data.manifest, name, "validation")
        expected += [stream.read(w * SEQ_LEN, SEQ_LEN + 1).tolist() for w in range((len(stream) - 1) // SEQ_LEN)]
    for _ in range(2):
        assert [row for batch in english for row in batch["tokens"].tolist()] == expected


def test_validation_can_be_limited(root: Path) -> None:
    data = _module(root, val_samples=5)
    everything = [row for batch in _module(root).val_dataloader()[0] for row in batch["tokens"].tolist()]
    some = [row for batch in data.val_dataloader()[0] for row in batch["tokens"].tolist()]
    assert some == [everything[number * len(everything) // 5] for number in range(5)]


def test_ranks_share_validation(root: Path) -> None:
    whole = [row for batch in _module(root).val_dataloader()[1] for row in batch["tokens"].tolist()]
    shared = []
    for rank in range(3):
        data = _module(root)
        _attach(data, rank=rank, world=3)
        shared += [row for batch in data.val_dataloader()[1] for row in batch["tokens"].tolist()]
    assert sorted(shared) == sorted(whole)


def test_repeated_validation_samples_are_announced(root: Path) -> None:
    data = _module(root, batch_size=1, val_samples=4)
    _attach(data, world=3)
    with pytest.warns(UserWarning, match="4 windows for 3 ranks; 2 count twice"):
        data.val_dataloader()


def test_held_batch_has_every_language_and_never_changes(root: Path) -> None:
    first, second = _module(root), _module(root, seed=9)
    assert set(first.held_batch()["language"].tolist()) == {0, 1}
    assert all(torch.equal(value, second.held_batch()[key]) for key, value in first.held_batch().items())
    assert BilingualText(root, seq_len=SEQ_LEN, batch_size=1).held_batch()["language"].tolist() == [0, 1]


def test_default_weights_are_by_tokens(root: Path) -> None:
    data = _module(root)
    tokens = {name: info.splits["train"].tokens for name, info in data.manifest.corpora.items()}
    assert data.mixture == {name: float(count) for name, count in tokens.items()}
    assert data.bytes_per_token["zh"] == pytest.approx(data.manifest.corpora["zh"].splits["train"].bytes / tokens["zh"])


def test_metadata_is_plain_and_says_what_decides_the_samples(root: Path) -> None:
    metadata = _module(root).metadata()
    assert json.loads(json.dumps(metadata)) == metadata
    assert metadata["languages"] == ["en", "zh"] and metadata["world"] is None
    for change in ({"seed": 1}, {"seq_len": 8}, {"weights": {"web": 1}}, {"document_mask": False}):
        assert _module(root, **change).metadata()["fingerprint"] != metadata["fingerprint"]
    for same in ({"batch_size": 2}, {"num_workers": 2}, {"val_samples": 3}):
        assert _module(root, **same).metadata()["fingerprint"] == metadata["fingerprint"]


def test_changed_data_are_refused_unless_allowed(root: Path) -> None:
    state = _module(root, weights={"web": 1, "zh": 1}).state_dict()
    with pytest.raises(InputError, match=r"corpora\.zh\.weight was 1, is 3, seed was 0, is 1; .*allow_data_change"):
        _module(root, weights={"web": 1, "zh": 3}, seed=1).load_state_dict(state)
    allowed = _module(root, weights={"zh": 1}, allow_data_change=True)
    allowed.load_state_dict({**state, "consumed_samples": 8, "finished_batches": 2})
    assert allowed.consumed_samples == 8


# Wrong input


def test_a_folder_that_was_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="growmoe prepare"):
        BilingualText(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "data.seq_len=0"),
        ({"batch_size": -1}, "data.batch_size=-1"),
        ({"num_workers": -1}, "data.num_workers=-1"),
        ({"val_samples": 0}, "data.val_samples=0"),
        ({"seed": -1}, "data.seed=-1"),
        ({"weights": {}}, "names no corpus"),
        ({"weights": {"web": -1, "zh": 1}}, "must be a positive number"),
        ({"weights": {"web": 0, "zh": 0}}, "must be a positive number"),
        ({"weights": {"fr": 1}}, "no corpus 'fr' .*it holds web, books, zh"),
        ({"seq_len": 100_000}, "fewer than one window of 100001"),
    ],
)
def test_wrong_options(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _module(root, **options)


def test_a_run_needs_an_end(root: Path) -> None:
    data = _module(root)
    _attach(data, steps=-1)
    with pytest.raises(InputError, match=r"trainer\.max_steps=-1"):
        data.train_dataloader()


def test_a_language_without_validation(root: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["corpora"]["zh"]["splits"]["validation"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"corpus 'zh' .*has no split 'validation', only train"):
        _module(copy)
    manifest["corpora"] = {}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="holds no corpus"):
        _module(copy)


def test_an_exchanged_tokenizer(root: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    (copy / "tokenizer.json").write_text(train_tokenizer(["other"], 300).to_json())
    with pytest.raises(InputError, match="made with"):
        _module(copy)


def test_a_wrong_token_is_found_when_its_window_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one that came after the start, when the shards were scanned."""
    data = _module(root)
    _attach(data, steps=200)
    assert data._train is not None
    data._train.format = type(data._train.format)(SEQ_LEN, 1, data._train.format.token_bytes[:200])
    for source in data._train.sources:
        monkeypatch.setattr(source.stream, "vocab_size", 200)
    with pytest.raises(InputError, match=r"shard .*arrow offset \d+: token id 2\d\d >= vocabulary 200"):
        list(data.train_dataloader())

"""Writing a prepared folder: documents in, token shards out, in memory that one batch needs.

Documents are first spooled as text, so that a tokenizer can be trained on them and every worker can take its part, then
encoded by `datasets` and saved with `save_to_disk`. All of it happens in a folder beside the output, which is renamed
into place at the end: the output is whole or absent.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa

from datamodules.manifest import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    CorpusInfo,
    FileInfo,
    Manifest,
    SplitInfo,
    hash_file,
)
from datamodules.order import hash_fraction
from datamodules.shards import TOKENS_COLUMN, TokenStream
from datamodules.tokenizer import Tokenizer, tokenizer_threads
from modules.errors import InputError
from modules.files import replace_file, sync_directory, sync_file

_TEXT_COLUMN = "text"
_SPOOL = ".spool"
_BATCH_BYTES = 4 * 2**20
_BATCH_DOCUMENTS = 1024
_ENCODE_DOCUMENTS = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class ShardWriter:
    """Builds one prepared folder; use it as a context, call `add_corpus` for each corpus, then `finish`.

    Leaving the context without `finish` removes everything that was written.

    Args:
        output: the folder to make; it must not exist.
    """

    def __init__(self, output: str | Path) -> None:
        self.output = Path(output)
        if self.output.exists():
            raise InputError(f"output {self.output} exists already; choose another folder or remove it")
        self._aside = self.output.with_name(f"{self.output.name}.tmp-{uuid4().hex}")
        self._corpora: dict[str, tuple[str, dict[str, int]]] = {}
        self._counts: dict[tuple[str, str], tuple[int, int]] = {}  # documents and bytes by corpus and split

    def __enter__(self) -> "ShardWriter":
        try:
            (self._aside / _SPOOL).mkdir(parents=True)
        except OSError as error:
            raise InputError(f"output {self.output} cannot be made: {error.strerror}; choose another folder") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._aside, ignore_errors=True)

    def add_corpus(self, name: str, language: str, documents: Iterable[tuple[str, str]]) -> None:
        """Spools the documents of one corpus.

        Args:
            name: names the corpus and its folder.
            language: the language its loss is reported under.
            documents: pairs of split (`train` or `validation`) and text.
        """
        if not _NAME.fullmatch(name) or name in (MANIFEST, TOKENIZER):
            raise InputError(f"corpus name {name!r} is no folder name; use letters, digits, '.', '_' and '-'")
        if name in self._corpora:
            raise InputError(f"corpus {name!r} is given twice; give each corpus one name and all of its inputs")
        spools = {split: _Spool(self._spool_path(name, split)) for split in SPLITS}
        try:
            for split, text in documents:
                spools[split].add(text)
        finally:
            for spool in spools.values():
                spool.close()
        for split, spool in spools.items():
            if not spool.documents:
                found = ", ".join(f"{other.documents} in {key}" for key, other in spools.items())
                raise InputError(
                    f"corpus {name!r} has no document in split {split!r} ({found}); "
                    "add documents or change the validation fraction"
                )
            self._counts[name, split] = (spool.documents, spool.bytes)
        self._corpora[name] = (language, {})

    def set_dropped(self, name: str, dropped: dict[str, int]) -> None:
        """Notes in the manifest how many documents of a corpus were left out, by reason."""
        self._corpora[name] = (self._corpora[name][0], dict(dropped))

    def count(self, name: str) -> tuple[int, int]:
        """Documents and bytes of a corpus that were added, over all splits."""
        counts = [self._counts[name, split] for split in SPLITS]
        return sum(documents for documents, _ in counts), sum(num_bytes for _, num_bytes in counts)

    def texts(self, limit_bytes: int | None = None) -> Iterator[str]:
        """Training texts, to train a tokenizer on: all of them, or a fixed sample of about `limit_bytes`."""
        total = sum(num_bytes for (_, split), (_, num_bytes) in self._counts.items() if split == "train")
        share = 1.0 if limit_bytes is None or total <= limit_bytes else limit_bytes / total
        for name in self._corpora:
            with pa.memory_map(str(self._spool_path(name, "train"))) as source, pa.ipc.open_stream(source) as reader:
                for batch in reader:
                    texts = batch.column(0).to_pylist()
                    yield from (text for text in texts if share == 1.0 or hash_fraction(text) < share)

    def finish(
        self,
        tokenizer: Tokenizer,
        *,
        num_workers: int = 1,
        extra: dict[str, Any] | None = None,
        on_split: Callable[[str, str], None] | None = None,
    ) -> Manifest:
        """Encodes every corpus, writes tokenizer and manifest, and renames the folder into place.

        Args:
            tokenizer: makes the tokens; its end-of-text token closes every document.
            num_workers: processes that encode; with 1, the tokenizer's own threads use the cores.
            extra: kept in the manifest as it is.
            on_split: called with corpus and split before each is encoded.
        """
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        corpora = {}
        for name, (language, dropped) in self._corpora.items():
            splits = {}
            for split in SPLITS:
                if on_split is not None:
                    on_split(name, split)
                splits[split] = self._write_split(name, split, tokenizer, dtype, num_workers)
            corpora[name] = CorpusInfo(language, splits, dropped)
        manifest = Manifest(tokenizer.sha256, tokenizer.vocab_size, dtype, corpora, extra or {})
        shutil.rmtree(self._aside / _SPOOL)
        replace_file(self._aside / TOKENIZER, tokenizer.to_json().encode())
        replace_file(self._aside / MANIFEST, manifest.to_json().encode())
        for folder, _, files in os.walk(self._aside):
            for file in files:
                sync_file(Path(folder, file))
            sync_directory(Path(folder))
        if self.output.exists():
            raise InputError(f"output {self.output} was made by something else meanwhile; choose another folder")
        self._aside.rename(self.output)
        sync_directory(self.output.parent)
        return manifest

    def _spool_path(self, name: str, split: str) -> Path:
        return self._aside / _SPOOL / f"{name}.{split}.arrow"

    def _write_split(self, name: str, split: str, tokenizer: Tokenizer, dtype: str, num_workers: int) -> SplitInfo:
        spool, cache = self._spool_path(name, split), self._aside / _SPOOL / f"{name}.{split}"
        cache.mkdir()
        folder = self._aside / name / split
        _save_tokens(spool, cache / "tokens.arrow", folder, tokenizer, dtype, num_workers)
        spool.unlink()
        shutil.rmtree(cache)
        paths = sorted(folder.glob("data-*.arrow"))
        stream = TokenStream(paths, tokenizer.vocab_size)
        files = tuple(
            FileInfo(path.relative_to(self._aside).as_posix(), path.stat().st_size, hash_file(path)) for path in paths
        )
        documents, num_bytes = self._counts[name, split]
        return SplitInfo(documents, num_bytes, len(stream), stream.scan(limit=len(stream)), files)


class _Spool:
    """Texts of one split, written to an Arrow file in batches."""

    def __init__(self, path: Path) -> None:
        self.documents = self.bytes = 0
        self._schema = pa.schema([(_TEXT_COLUMN, pa.large_string())])
        self._writer = pa.ipc.new_stream(str(path), self._schema)
        self._texts: list[str] = []
        self._pending = 0

    def add(self, text: str) -> None:
        size = len(text.encode())
        self._texts.append(text)
        self._pending += size
        self.documents += 1
        self.bytes += size
        if self._pending >= _BATCH_BYTES or len(self._texts) >= _BATCH_DOCUMENTS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._texts:
            texts = pa.array(self._texts, pa.large_string())
            self._writer.write_batch(pa.record_batch([texts], schema=self._schema))
        self._texts, self._pending = [], 0


def _save_tokens(spool: Path, cache: Path, folder: Path, tokenizer: Tokenizer, dtype: str, num_workers: int) -> None:
    """Encodes spooled texts and saves them as a data set of token lists."""
    import datasets

    features = datasets.Features({TOKENS_COLUMN: datasets.List(datasets.Value(dtype))})
    with _quiet_datasets(datasets), tokenizer_threads(num_workers <= 1):
        texts = datasets.Dataset.from_file(str(spool))
        encoded = texts.map(
            _Encoder(tokenizer.to_json(), dtype),
            batched=True,
            batch_size=_ENCODE_DOCUMENTS,
            writer_batch_size=_ENCODE_DOCUMENTS,
            num_proc=min(num_workers, len(texts)) if num_workers > 1 else None,
            remove_columns=[_TEXT_COLUMN],
            features=features,
            cache_file_name=str(cache),
            new_fingerprint=uuid4().hex,
        )
        encoded.save_to_disk(str(folder))


class _Encoder:
    """Turns a batch of texts into token lists with their end tokens; can be sent to another process."""

    def __init__(self, tokenizer_json: str, dtype: str) -> None:
        self._json, self._dtype = tokenizer_json, dtype
        self._tokenizer: Tokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}

    def __call__(self, batch: dict[str, Sequence[str]]) -> dict[str, list[np.ndarray]]:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_json(self._json)
        end = self._tokenizer.eos_id
        ids = self._tokenizer.encode_batch(batch[_TEXT_COLUMN])
        return {TOKENS_COLUMN: [np.array([*row, end], dtype=self._dtype) for row in ids]}


@contextmanager
def _quiet_datasets(datasets: ModuleType) -> Iterator[None]:
    """Turns the progress bars of `datasets` off for a while."""
    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()

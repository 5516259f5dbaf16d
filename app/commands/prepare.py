"""`growmoe prepare`: text into token shards."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datamodules.documents import HUB, ReadOptions, find_files, read_documents
from datamodules.manifest import Manifest
from datamodules.order import hash_fraction
from modules.errors import InputError

_TRAIN_BYTES = 100 * 2**20  # of text that a tokenizer is trained on: more changes little and costs memory
CONTAMINATED = "contaminated"
"""why a document is left out that repeats test items"""


def prepare(
    inputs: list[str],
    *,
    output: Path,
    tokenizer: Path | None = None,
    train_tokenizer: int | None = None,
    text_column: str = "text",
    text_unit: Literal["file", "paragraph", "line"] = "file",
    validation_fraction: float = 0.005,
    num_workers: int = 1,
    max_document_bytes: int = 16 * 2**20,
    max_dropped_fraction: float = 0.1,
    decontaminate: str | None = None,
    decontaminate_words: int = 13,
    data_mirror: Path | None = None,
    missing: Literal["error", "skip"] = "error",
) -> None:
    """Turn text, JSONL, parquet or Hub data sets into a folder of token shards to train on.

    Each corpus gets a training and a validation split. Which document goes where depends on its text alone, so equal
    documents are never on both sides. The folder is written aside and appears when it is whole.

    Args:
        inputs: each `LANGUAGE=WHERE` or `NAME:LANGUAGE=WHERE`, with as many as you like for one corpus. WHERE is a
            file, a folder, a pattern such as `books/*.parquet`, or `hub:ORG/NAME[:CONFIG][@SPLIT]` to stream from the
            Hub. Files are .txt, .text, .md, .jsonl, .ndjson (these also .gz) or .parquet.
        output: the folder to make; it must not exist.
        tokenizer: the tokenizer.json to use.
        train_tokenizer: train a byte-level BPE of this vocabulary on the inputs instead.
        text_column: the field that holds the text in JSONL, parquet and Hub rows.
        text_unit: what one document is in a text file.
        validation_fraction: share of the documents to keep for validation.
        num_workers: processes that encode; 1 uses the tokenizer's threads.
        max_document_bytes: drop longer documents.
        max_dropped_fraction: give up if more than this share of a corpus is empty, broken or too long.
        decontaminate: leave out documents that repeat test items of these suites or lm-eval tasks, with commas between
            them, such as core_en,zh; how many is told.
        decontaminate_words: words in a row that a document may not share with an item; a Han character counts as half a
            word. Items that are shorter, down to 8 words, may not be there as a whole.
        data_mirror: as in evaluate, for the items.
        missing: as in evaluate.
    """
    corpora = parse_inputs(inputs)
    _check(tokenizer, train_tokenizer, validation_fraction, num_workers, max_document_bytes, max_dropped_fraction)
    # imported here, so that wrong arguments are known at once and --help is quick
    from datamodules.shard_writer import ShardWriter
    from datamodules.tokenizer import Tokenizer
    from datamodules.tokenizer import train_tokenizer as train

    began = time.perf_counter()
    known = Tokenizer.load(tokenizer) if tokenizer is not None else None
    options = ReadOptions(text_column, text_unit, max_document_bytes)
    sieve = None
    if decontaminate is None and (data_mirror is not None or missing != "error" or decontaminate_words != 13):
        raise InputError("data_mirror, missing and decontaminate_words are for decontaminate; name its suites, too")
    if decontaminate is not None:
        sieve = _Sieve(decontaminate, decontaminate_words, data_mirror, missing)
    with ShardWriter(output) as writer:
        for corpus in corpora:
            dropped: Counter[str] = Counter()
            documents = corpus.documents(options, validation_fraction, dropped)
            if sieve is not None:
                documents = sieve.clean(documents, dropped)
            writer.add_corpus(corpus.name, corpus.language, documents)
            writer.set_dropped(corpus.name, dropped)
            _check_dropped(corpus.name, writer.count(corpus.name)[0], dropped, max_dropped_fraction)
        if known is None:
            assert train_tokenizer is not None, "checked above"
            known = train(writer.texts(_TRAIN_BYTES), train_tokenizer)
        extra = None if sieve is None else {"decontaminated": sieve.record()}
        manifest = writer.finish(known, num_workers=num_workers, extra=extra)
    _print_table(manifest, output, time.perf_counter() - began)
    if sieve is not None:
        sys.stdout.write(sieve.summary())


@dataclass(frozen=True)
class CorpusInput:
    """One corpus as the command line names it."""

    name: str
    language: str
    locations: tuple[str, ...]

    def documents(
        self, options: ReadOptions, validation_fraction: float, dropped: Counter[str]
    ) -> Iterator[tuple[str, str]]:
        """Split and text of every document."""
        for location in self.locations:
            for text in read_documents(location, options, dropped):
                yield ("validation" if hash_fraction(text) < validation_fraction else "train"), text


class _Sieve:
    """Keeps test items of an evaluation out of the corpora.

    Raises:
        InputError: suites and tasks that are unknown, or whose data are not at hand; fewer words than chance repeats.
    """

    def __init__(self, tasks: str, words: int, data_mirror: Path | None, missing: Literal["error", "skip"]) -> None:
        from callbacks.evaluation.items import item_documents
        from callbacks.evaluation.suites import choose_suite
        from callbacks.evaluation.tasks import Source, load_tasks
        from datamodules.decontamination import Decontaminator, text_fields

        suite = choose_suite(tasks)
        if suite.embedded:
            raise InputError(
                f"decontaminate={tasks} asks about an embedded world, whose questions no corpus holds; name other tasks"
            )
        mirror = None if data_mirror is None else data_mirror.absolute()
        self._loaded = load_tasks(suite, Source(mirror=mirror, missing=missing))
        documents = item_documents(self._loaded)
        items = {name: (text for row in rows for text in text_fields(row)) for name, rows in documents.items()}
        self._words = words
        self._sieve = Decontaminator(items, words)

    def clean(self, documents: Iterator[tuple[str, str]], dropped: Counter[str]) -> Iterator[tuple[str, str]]:
        """The documents that repeat nothing; the others are counted."""
        for split, text in documents:
            if self._sieve.repeats(text) is None:
                yield split, text
            else:
                dropped[CONTAMINATED] += 1

    def record(self) -> dict[str, Any]:
        """For the manifest."""
        facts = {"suite": self._loaded.suite.name, "words": self._words, "items": self._sieve.num_items}
        if self._loaded.missing:
            facts["missing"] = sorted(self._loaded.missing)
        if self._loaded.mirror_hash is not None:
            facts["mirror"] = self._loaded.mirror_hash
        return {**facts, "dropped": dict(self._sieve.found.most_common())}

    def summary(self) -> str:
        """For people."""
        found = self._sieve.found
        names = ", ".join(f"{count} {name}" for name, count in found.most_common(8))
        more = f" and {len(found) - 8} more tasks" if len(found) > 8 else ""
        without = f"; without {', '.join(self._loaded.missing)}" if self._loaded.missing else ""
        return (
            f"{self._loaded.suite.name}: {found.total()} documents repeat one of {self._sieve.num_items:,} texts of "
            f"test items{f' ({names}{more})' if found else ''}, and are left out{without}\n"
        )


def parse_inputs(inputs: list[str]) -> list[CorpusInput]:
    """The corpora that `LANGUAGE=WHERE` and `NAME:LANGUAGE=WHERE` arguments name, in the order they first appear."""
    found: dict[str, CorpusInput] = {}
    for text in inputs:
        left, equals, location = text.partition("=")
        name, colon, language = left.partition(":")
        language = language if colon else name
        if not (equals and name and language.isalpha() and location):
            raise InputError(
                f"input {text!r} is not LANGUAGE=WHERE or NAME:LANGUAGE=WHERE; write e.g. en=books.jsonl or "
                "books:en=books/*.parquet"
            )
        before = found.get(name, CorpusInput(name, language, ()))
        if before.language != language:
            raise InputError(f"corpus {name!r} is given in {before.language!r} and {language!r}; use two names")
        if not location.startswith(HUB):
            find_files(location)
        found[name] = CorpusInput(name, language, (*before.locations, location))
    if not found:
        raise InputError("no inputs; give at least one LANGUAGE=WHERE, e.g. en=books.jsonl")
    return list(found.values())


def _check(
    tokenizer: Path | None,
    train_tokenizer: int | None,
    validation_fraction: float,
    num_workers: int,
    max_document_bytes: int,
    max_dropped_fraction: float,
) -> None:
    if (tokenizer is None) == (train_tokenizer is None):
        count = "neither" if tokenizer is None else "both"
        raise InputError(f"tokenizer and train_tokenizer: {count} given; give exactly one of them")
    if not 0 < validation_fraction <= 0.5:
        raise InputError(f"validation_fraction={validation_fraction} is out of range; choose above 0 and up to 0.5")
    if not 0 <= max_dropped_fraction <= 1:
        raise InputError(f"max_dropped_fraction={max_dropped_fraction} is out of range; choose from 0 to 1")
    for name, value in (("num_workers", num_workers), ("max_document_bytes", max_document_bytes)):
        if value < 1:
            raise InputError(f"{name}={value} is too small; it must be at least 1")


def _check_dropped(name: str, num_kept: int, dropped: Counter[str], limit: float) -> None:
    broken = Counter({reason: count for reason, count in dropped.items() if reason != CONTAMINATED})
    share = broken.total() / max(1, num_kept + broken.total())
    if share > limit:
        reasons = ", ".join(f"{count} {reason}" for reason, count in broken.most_common())
        raise InputError(
            f"corpus {name!r}: {share:.1%} of the documents would be dropped ({reasons}), more than "
            f"max_dropped_fraction={limit}; repair the input or raise the limit"
        )


def _print_table(manifest: Manifest, output: Path, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file or a pipe has no width of its own
    table = Table(title=f"{output} in {seconds:.0f} s, vocabulary {manifest.vocab_size}")
    for column in ("corpus", "language", "split", "documents", "bytes", "tokens", "bytes per token", "dropped"):
        table.add_column(column, justify="left" if column in ("corpus", "language", "split") else "right")
    for name, corpus in manifest.corpora.items():
        for split, info in corpus.splits.items():
            dropped = ", ".join(f"{count} {reason}" for reason, count in corpus.dropped.items()) or "0"
            counts = (f"{count:,}" for count in (info.documents, info.bytes, info.tokens))
            ratio = f"{info.bytes / info.tokens:.2f}"
            table.add_row(name, corpus.language, split, *counts, ratio, dropped if split == "train" else "")
    console.print(table)

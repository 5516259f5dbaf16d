"""What a prepared folder holds, written once beside its token shards.

    <root>/tokenizer.json
    <root>/manifest.json
    <root>/<corpus>/{train,validation}/data-*.arrow

The manifest says what must be there, so that a missing, truncated or exchanged file is found before the first step.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modules.errors import InputError

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"


@dataclass(frozen=True)
class FileInfo:
    """One shard: its path inside the prepared folder, its size, and the hash of its bytes."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """One split of a corpus. `bytes` is UTF-8 text; `tokens` includes one end-of-text token per document."""

    documents: int
    bytes: int
    tokens: int
    max_token_id: int
    files: tuple[FileInfo, ...]


@dataclass(frozen=True)
class CorpusInfo:
    """One corpus: its language, its splits, and how many documents were dropped for which reason."""

    language: str
    splits: dict[str, SplitInfo]
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The content of a prepared folder. `extra` is kept as it is (the parameters of a synthetic world)."""

    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    corpora: dict[str, CorpusInfo]
    extra: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """The manifest that `to_json` wrote; raises KeyError, TypeError or ValueError for anything else."""
        raw = json.loads(text)
        if raw["format"] != FORMAT_VERSION:
            raise ValueError(f"format {raw['format']}, this program reads format {FORMAT_VERSION}")
        corpora = {}
        for name, corpus in raw["corpora"].items():
            splits = {
                split: SplitInfo(**{**info, "files": tuple(FileInfo(**file) for file in info["files"])})
                for split, info in corpus["splits"].items()
            }
            corpora[name] = CorpusInfo(corpus["language"], splits, corpus["dropped"])
        return cls(**{**raw, "corpora": corpora})


def read_manifest(root: Path) -> Manifest:
    """Reads the manifest of a prepared folder.

    Raises:
        InputError: if it is missing or damaged; the message names `growmoe prepare`.
    """
    path = root / MANIFEST
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no {MANIFEST} in {root}: not a prepared folder; make one with `growmoe prepare`") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}); make the folder again with `growmoe prepare`") from None


def hash_file(path: Path) -> str:
    """The sha256 of a file, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

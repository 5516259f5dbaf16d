"""Reading token shards: Arrow files whose list column is a memory-mapped stream of tokens.

A shard is what `datasets` saves for a column of token lists, one row per document with its end token. The values of
that column are the documents end to end; they are mapped, not read, and nothing is copied until a window is asked for.
"""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from datamodules.manifest import MANIFEST, TOKENIZER, Manifest, SplitInfo, hash_file
from datamodules.tokenizer import Tokenizer
from modules.errors import InputError

TOKENS_COLUMN = "tokens"
_SCAN_TOKENS = 2**28
_SCAN_PIECE = 2**20
_AGAIN = "make the folder again with `growmoe prepare`"


def map_tokens(path: Path) -> list[np.ndarray]:
    """The token values of one shard, one array per record batch, mapped from the file."""
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            column = reader.read_all().column(TOKENS_COLUMN)
    except (OSError, ValueError, KeyError) as error:  # Arrow's own errors derive from these
        reason = str(error).splitlines()[0]
        raise InputError(f"shard {path} cannot be read: {reason}; {_AGAIN}") from None
    return [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]


class TokenStream:
    """The tokens of one split of one corpus as a single sequence over all of its shards.

    Args:
        paths: the shards in order.
        vocab_size: every id must be below this.
    """

    def __init__(self, paths: Sequence[Path], vocab_size: int) -> None:
        self.paths = list(paths)
        self.vocab_size = vocab_size
        self._pieces: list[np.ndarray] = []
        self._piece_paths: list[tuple[Path, int]] = []  # the shard, and where in it the piece begins
        for path in self.paths:
            offset = 0
            for piece in map_tokens(path):
                if len(piece):
                    self._pieces.append(piece)
                    self._piece_paths.append((path, offset))
                    offset += len(piece)
        self._starts = np.cumsum([0, *(len(piece) for piece in self._pieces)]).tolist()

    def __reduce__(self) -> tuple:
        # a worker process maps the files itself; sending the arrays would copy them
        return TokenStream, (self.paths, self.vocab_size)

    def __len__(self) -> int:
        return self._starts[-1]

    def read_into(self, start: int, row_L: np.ndarray) -> None:
        """Copies the tokens from `start` into `row_L`; they must exist. Their ids are not checked."""
        number = bisect_right(self._starts, start) - 1
        offset, filled = start - self._starts[number], 0
        while filled < len(row_L):
            piece = self._pieces[number][offset : offset + len(row_L) - filled]
            row_L[filled : filled + len(piece)] = piece
            filled += len(piece)
            number, offset = number + 1, 0

    def read(self, start: int, length: int) -> np.ndarray:
        """The tokens from `start`: int64 [length]."""
        row_L = np.empty(length, dtype=np.int64)
        self.read_into(start, row_L)
        return row_L

    def refuse(self, start: int, tokens_L: np.ndarray) -> None:
        """Raises the error that names the first of `tokens_L`, read from `start`, that is outside the vocabulary."""
        position = start + int(np.argmax(tokens_L >= self.vocab_size))
        number = bisect_right(self._starts, position) - 1
        path, first = self._piece_paths[number]
        raise InputError(
            f"shard {path} offset {first + position - self._starts[number]}: token id {tokens_L[position - start]} >= "
            f"vocabulary {self.vocab_size}; {_AGAIN}"
        )

    def scan(self, limit: int = _SCAN_TOKENS) -> int:
        """Checks up to `limit` tokens, spread over the stream, and returns the largest id found."""
        num_pieces = max(1, -(-min(limit, len(self)) // _SCAN_PIECE))
        largest = 0
        for number in range(num_pieces):
            start = number * len(self) // num_pieces
            stop = min(start + _SCAN_PIECE, (number + 1) * len(self) // num_pieces)
            largest = max(largest, self._scan_range(start, stop))
        return largest

    def _scan_range(self, start: int, stop: int) -> int:
        largest = 0
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            first = self._starts[number]
            piece = self._pieces[number][start - first : stop - first]
            largest = max(largest, int(piece.max()))
            if largest >= self.vocab_size:
                self.refuse(start, piece)
            start, number = start + len(piece), number + 1
        return largest


def check_tokenizer(root: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Refuses a prepared folder whose tokens were made by another tokenizer."""
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise InputError(
            f"{root / TOKENIZER} has sha256 {tokenizer.sha256[:12]}, but {MANIFEST} says the tokens were made with "
            f"{manifest.tokenizer_sha256[:12]}; put the right tokenizer back or {_AGAIN}"
        )


def check_files(root: Path, info: SplitInfo, *, verify: bool = False) -> list[Path]:
    """The shards of a split, after checking that each is there, has its size and, with `verify`, its hash."""
    paths = []
    for file in info.files:
        path = root / file.name
        if not path.is_file():
            raise InputError(f"shard {path} is missing, but {MANIFEST} lists it; {_AGAIN}")
        size = path.stat().st_size
        if size != file.bytes:
            raise InputError(f"shard {path} has {size} bytes, {MANIFEST} says {file.bytes}; {_AGAIN}")
        if verify and (found := hash_file(path)) != file.sha256:
            raise InputError(f"sha256 mismatch in shard {path}: {found[:12]}, not {file.sha256[:12]}; {_AGAIN}")
        paths.append(path)
    return paths


def open_split(root: Path, manifest: Manifest, corpus: str, split: str, *, verify: bool = False) -> TokenStream:
    """Opens one split of one corpus of a prepared folder.

    Args:
        root: the prepared folder.
        manifest: what `read_manifest(root)` returned.
        corpus: a corpus of the manifest.
        split: `train` or `validation`.
        verify: also compare the sha256 of every shard, which reads all of it.

    Raises:
        InputError: for an unknown corpus or split, a missing, truncated or changed file, an id outside the vocabulary.
    """
    if corpus not in manifest.corpora:
        raise InputError(f"no corpus {corpus!r} in {root}; it holds {', '.join(manifest.corpora) or 'none'}")
    splits = manifest.corpora[corpus].splits
    if split not in splits:
        raise InputError(f"corpus {corpus!r} in {root} has no split {split!r}, only {', '.join(splits)}; {_AGAIN}")
    info = splits[split]
    if info.tokens < 1:
        raise InputError(f"corpus {corpus!r} in {root} is empty in split {split!r}; add documents and {_AGAIN}")
    if info.max_token_id >= manifest.vocab_size:
        raise InputError(
            f"corpus {corpus!r} in {root}: token id {info.max_token_id} >= vocabulary {manifest.vocab_size}; {_AGAIN}"
        )
    stream = TokenStream(check_files(root, info, verify=verify), manifest.vocab_size)
    if len(stream) != info.tokens:
        raise InputError(
            f"corpus {corpus!r} in {root}: {len(stream)} tokens in split {split!r}, {MANIFEST} says {info.tokens}; "
            f"{_AGAIN}"
        )
    stream.scan()
    return stream

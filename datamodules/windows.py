"""Windows of tokens as samples: from a global sample index to the tensors of a batch, and who reads which index.

Shape letters: B batch, L sequence (inputs), a window having L + 1 tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.order import MixedOrder
from datamodules.shards import TokenStream

Sample = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Source:
    """One stream that windows are cut from, and the index of its language."""

    stream: TokenStream
    language: int


@dataclass(frozen=True)
class WindowFormat:
    """How windows become samples.

    Attributes:
        seq_len: L. Windows have L + 1 tokens and start every L tokens, so each token is a target once; a tail that
            fills no window is left out.
        eos_id: the token that closes a document.
        token_bytes: UTF-8 bytes that each token spells, int64 [V].
        document_mask: number the documents inside a window; without it a window counts as one document.
    """

    seq_len: int
    eos_id: int
    token_bytes: np.ndarray
    document_mask: bool = True

    def num_windows(self, num_tokens: int) -> int:
        """Windows that a stream of so many tokens gives."""
        return max(0, (num_tokens - 1) // self.seq_len)


def number_documents(inputs_BL: np.ndarray, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Document and position ids of input tokens, both int64 [B, L].

    An end-of-text token at an input position begins the next document, at position 0, so that every document is
    predicted from one end-of-text token. Documents count from 0 inside each window.
    """
    starts_BL = inputs_BL == eos_id
    document_ids_BL = np.cumsum(starts_BL, axis=1, dtype=np.int64)
    document_ids_BL -= document_ids_BL[:, :1]
    places_L = np.arange(inputs_BL.shape[1])
    last_start_BL = np.maximum.accumulate(np.where(starts_BL, places_L, 0), axis=1)
    return document_ids_BL, places_L - last_start_BL


class _Windows(Dataset[Sample], ABC):
    """Samples of windows, cut and checked a batch at a time."""

    def __init__(self, sources: Sequence[Source], window_format: WindowFormat) -> None:
        self.sources = list(sources)
        self.format = window_format

    @abstractmethod
    def _place(self, index: int) -> tuple[int, int]:
        """The source of a sample and the window inside it."""

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        seq_len, vocab_size = self.format.seq_len, len(self.format.token_bytes)
        tokens_BL = np.empty((len(indices), seq_len + 1), dtype=np.int64)
        language_B = np.empty(len(indices), dtype=np.int64)
        places = [self._place(index) for index in indices]
        for row, (source, window) in enumerate(places):
            self.sources[source].stream.read_into(window * seq_len, tokens_BL[row])
            language_B[row] = self.sources[source].language
        if tokens_BL.max() >= vocab_size:
            row = int(np.argmax(tokens_BL.max(axis=1) >= vocab_size))
            source, window = places[row]
            self.sources[source].stream.refuse(window * seq_len, tokens_BL[row])
        return self._to_samples(tokens_BL, language_B)

    def _to_samples(self, tokens_BL: np.ndarray, language_B: np.ndarray) -> list[Sample]:
        inputs_BL = tokens_BL[:, :-1]
        if self.format.document_mask:
            document_ids_BL, position_ids_BL = number_documents(inputs_BL, self.format.eos_id)
        else:
            document_ids_BL = np.zeros_like(inputs_BL)
            position_ids_BL = np.broadcast_to(np.arange(inputs_BL.shape[1]), inputs_BL.shape).copy()
        batch = {
            "tokens": tokens_BL,
            "document_ids": document_ids_BL,
            "position_ids": position_ids_BL,
            "language": language_B,
            "target_bytes": self.format.token_bytes[tokens_BL[:, 1:]].sum(axis=1),
        }
        columns = {name: torch.from_numpy(column).unbind(0) for name, column in batch.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


class MixedWindows(_Windows):
    """Training samples: endless, addressed by the global sample index, in the order of a `MixedOrder`."""

    def __init__(self, sources: Sequence[Source], window_format: WindowFormat, order: MixedOrder) -> None:
        super().__init__(sources, window_format)
        self.order = order

    def _place(self, index: int) -> tuple[int, int]:
        location = self.order.locate(index)
        return location.source, location.window


class FixedWindows(_Windows):
    """Validation samples: the windows of several sources one after another, or `limit` of them evenly spread."""

    def __init__(self, sources: Sequence[Source], window_format: WindowFormat, limit: int | None = None) -> None:
        super().__init__(sources, window_format)
        counts = [window_format.num_windows(len(source.stream)) for source in sources]
        self._ends = np.cumsum(counts)
        self._total = sum(counts)
        self._length = self._total if limit is None else min(limit, self._total)

    def __len__(self) -> int:
        return self._length

    def _place(self, index: int) -> tuple[int, int]:
        window = index * self._total // self._length
        source = int(np.searchsorted(self._ends, window, side="right"))
        return source, window - (int(self._ends[source - 1]) if source else 0)


class GlobalBatchSampler:
    """The sample indices of one rank's micro-batches, from a position in the global order to the end of the run.

    Micro-batch m of the run takes the next batch_size * world samples, and rank r the r-th batch_size of them. So the
    samples of a step depend on where the run stands, not on how many ranks or workers share it.

    Args:
        first_sample: global samples consumed before this loader.
        first_batch: micro-batches finished before this loader.
        num_batches: micro-batches of the whole run, which is also its `len()`.
        batch_size: samples in a micro-batch of one rank.
        rank: this rank.
        world: number of ranks.
    """

    def __init__(
        self, *, first_sample: int, first_batch: int, num_batches: int, batch_size: int, rank: int, world: int
    ) -> None:
        self.first_sample, self.first_batch, self.num_batches = first_sample, first_batch, num_batches
        self.batch_size, self.rank, self.world = batch_size, rank, world

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.num_batches - self.first_batch):
            start = self.first_sample + (number * self.world + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))


def deal_evenly(num_samples: int, batch_size: int, rank: int, world: int) -> list[list[int]]:
    """The batches of one rank that together with the other ranks' cover every sample exactly once.

    Every rank gets the same number of batches, as collectives need, and batch sizes differ by at most one. Only if
    there are fewer samples than batches does a batch repeat a sample of another; the caller says so (`num_repeated`).
    """
    total = -(-num_samples // (batch_size * world)) * world
    batches = []
    for number in range(rank, total, world):
        start, stop = number * num_samples // total, (number + 1) * num_samples // total
        batches.append(list(range(start, stop)) or [start])
    return batches


def num_repeated(num_samples: int, batch_size: int, world: int) -> int:
    """How many samples `deal_evenly` counts twice over all ranks."""
    return sum(sum(map(len, deal_evenly(num_samples, batch_size, rank, world))) for rank in range(world)) - num_samples

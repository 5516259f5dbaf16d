"""What rows of a batch begin with: computed once, its keys and values lent to each of them.

Letters: B batch, L sequence.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from callbacks.evaluation.batching import Batch, Family
from callbacks.evaluation.company import Company
from modules.layers.attention import KVCache
from modules.layers.transformer import Transformer


class Lender:
    """Computes what the rows of a batch begin with, and lends keys and values of it to each of them.

    The last one is kept: rows of one large family come in several batches.
    """

    def __init__(self, network: Transformer, company: Company, device: torch.device) -> None:
        self.network, self.company, self.device = network, company, device
        self._families: tuple[Family, ...] = ()
        self._cache: KVCache | None = None
        self._hidden_FPD = torch.empty(0)

    def begin(self, batch: Batch, num_new: int) -> tuple[KVCache | None, Tensor | None]:
        """A cache with each row's beginning and room for more, and the final hidden states of beginnings [F, P, D],
        padded on the left; None where rows share nothing."""
        if not batch.has_prefix:
            return None, None
        if self._cache is None or self._families != batch.families:
            self._families = batch.families
            self._cache, self._hidden_FPD = self._computed(batch)
        rows = torch.tensor(batch.family_of_row, device=self.device)
        return self._cache.select(rows, self._cache.length + num_new), self._hidden_FPD

    def _computed(self, batch: Batch) -> tuple[KVCache, Tensor]:
        """Beginnings are padded on the left, where they are masked."""
        prefixes = [family.prefix for family in batch.families]
        inputs_BL = padded([prefix[::-1] for prefix in prefixes], 0, self.device).flip(1)
        start_B = torch.tensor(batch.starts, device=self.device)
        weight = next(self.network.parameters())
        rows, longest = inputs_BL.shape
        cache = KVCache(self.network.config, rows, longest, weight.device, weight.dtype, start_B)
        self.company.before_forward()
        hidden_FPD, _ = self.network(inputs_BL, cache=cache)
        return cache, hidden_FPD


class Scored:
    """The predictions of a batch that are asked for, each once: those of beginnings are the same for all rows.

    Attributes:
        places_of_row: for each row its scored predictions, in the order of its inputs.
    """

    def __init__(self, batch: Batch) -> None:
        starts = batch.starts
        self._in_prefix: dict[tuple[int, int], int] = {}
        self._in_suffix: list[tuple[int, int]] = []
        found = []
        for place, row in enumerate(batch.rows):
            number = batch.family_of_row[place]
            shared = batch.families[number].shared
            first = len(row.inputs) - row.num_scored
            for position in range(first, shared):
                key = (number, starts[number] + position)
                self._in_prefix.setdefault(key, len(self._in_prefix))
            inside = [self._in_prefix[number, starts[number] + position] for position in range(first, shared)]
            behind = range(max(first, shared) - shared, len(row.inputs) - shared)
            found.append((inside, len(self._in_suffix)))
            self._in_suffix += [(place, column) for column in behind]
        offset = len(self._in_prefix)
        self.places_of_row = [
            np.array([*inside, *range(offset + begin, offset + begin + row.num_scored - len(inside))])
            for (inside, begin), row in zip(found, batch.rows, strict=True)
        ]

    def pick(self, prefix_FPD: Tensor | None, suffix_RSD: Tensor) -> Tensor:
        """Their final hidden states [N, D]."""
        picked = [suffix_RSD[tuple(torch.tensor(self._in_suffix, device=suffix_RSD.device).T)]]
        if self._in_prefix:
            assert prefix_FPD is not None
            picked.insert(0, prefix_FPD[tuple(torch.tensor(list(self._in_prefix), device=prefix_FPD.device).T)])
        return torch.cat(picked)


def padded(rows: Sequence[np.ndarray], padding: int, device: torch.device) -> Tensor:
    """Rows of ids [B, L], padded on the right."""
    padded_BL = np.full((len(rows), max(map(len, rows))), padding, np.int64)
    for place, row in enumerate(rows):
        padded_BL[place, : len(row)] = row
    return torch.from_numpy(padded_BL).to(device)

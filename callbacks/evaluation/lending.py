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
    """Computes what the rows of a batch begin with, and lends keys and values of it to each of them."""

    def __init__(self, network: Transformer, company: Company, device: torch.device) -> None:
        self.network, self.company, self.device = network, company, device
        self._families: tuple[Family, ...] = ()
        self._cache: KVCache | None = None

    def cache_for(self, batch: Batch, num_new: int) -> KVCache | None:
        """A cache with each row's beginning, and room for more; None where rows share none. The last one is kept: rows
        of one large family come in several batches."""
        if not batch.has_prefix:
            return None
        if self._cache is None or self._families != batch.families:
            self._families, self._cache = batch.families, self._computed(batch)
        rows = torch.tensor(batch.family_of_row, device=self.device)
        return self._cache.select(rows, self._cache.length + num_new)

    def _computed(self, batch: Batch) -> KVCache:
        """Beginnings are padded on the left, where they are masked."""
        prefixes = [family.prefix for family in batch.families]
        longest = max(map(len, prefixes))
        inputs_BL = padded([prefix[::-1] for prefix in prefixes], 0, self.device).flip(1)
        start_B = torch.tensor([longest - len(prefix) for prefix in prefixes], device=self.device)
        weight = next(self.network.parameters())
        cache = KVCache(self.network.config, len(prefixes), longest, weight.device, weight.dtype, start_B)
        self.company.before_forward()
        self.network(inputs_BL, cache=cache)
        return cache


def padded(rows: Sequence[np.ndarray], padding: int, device: torch.device) -> Tensor:
    """Rows of ids [B, L], padded on the right."""
    padded_BL = np.full((len(rows), max(map(len, rows))), padding, np.int64)
    for place, row in enumerate(rows):
        padded_BL[place, : len(row)] = row
    return torch.from_numpy(padded_BL).to(device)

"""What rows of a batch begin with is computed once, and lent to each of them; which predictions are asked for.

Letters: T tokens, N scored predictions, D model.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from callbacks.evaluation.batching import Batch, Family
from callbacks.evaluation.company import Company
from modules.layers.packed import PackedRows
from modules.layers.transformer import Transformer


class Lender:
    """Runs batches. The beginnings of the last one are kept: rows of one large family come in several batches."""

    def __init__(self, network: Transformer, company: Company, device: torch.device) -> None:
        self.network, self.company, self.device = network, company, device
        self._families: tuple[Family, ...] = ()
        self._beginnings: PackedRows | None = None
        self._hidden_TD: Tensor | None = None

    def run(self, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """Final hidden states of the tokens of all beginnings, None where rows share nothing, and of all rows."""
        beginnings, begun_TD = None, None
        if batch.has_prefix:
            if self._families != batch.families:
                prefixes = [family.prefix for family in batch.families]
                kept = PackedRows([len(prefix) for prefix in prefixes], self.device, keep=True)
                self._families, self._beginnings, self._hidden_TD = batch.families, kept, self._forward(prefixes, kept)
            beginnings, begun_TD = self._beginnings, self._hidden_TD
        suffixes = [batch.suffix(place) for place in range(len(batch.rows))]
        rows = PackedRows([len(suffix) for suffix in suffixes], self.device, beginnings, batch.family_of_row)
        return begun_TD, self._forward(suffixes, rows)

    def _forward(self, pieces: Sequence[np.ndarray], rows: PackedRows) -> Tensor:
        tokens_1T = torch.from_numpy(np.concatenate(pieces).astype(np.int64))[None].to(self.device)
        self.company.before_forward()
        return self.network(tokens_1T, cache=rows)[0][0]


class Scored:
    """The predictions of a batch that are asked for, each once: those of beginnings are the same for all rows.

    Attributes:
        places_of_row: for each row its scored predictions, in the order of its inputs.
    """

    def __init__(self, batch: Batch) -> None:
        starts = np.cumsum([0, *(family.shared for family in batch.families)])
        self._begun: dict[int, int] = {}  # token of the beginnings -> its number
        self._own: list[int] = []  # tokens of the rows
        found, start = [], 0
        for place, row in enumerate(batch.rows):
            number = batch.family_of_row[place]
            shared, first = batch.families[number].shared, len(row.inputs) - row.num_scored
            tokens = [int(starts[number]) + position for position in range(first, shared)]
            found.append(([self._begun.setdefault(token, len(self._begun)) for token in tokens], len(self._own)))
            self._own += range(start + max(first, shared) - shared, start + len(row.inputs) - shared)
            start += len(row.inputs) - shared
        offset = len(self._begun)
        self.places_of_row = [
            np.array([*begun, *range(offset + own, offset + own + row.num_scored - len(begun))])
            for (begun, own), row in zip(found, batch.rows, strict=True)
        ]

    def pick(self, begun_TD: Tensor | None, own_TD: Tensor) -> Tensor:
        """Their final hidden states [N, D]."""
        picked = [own_TD[torch.tensor(self._own, device=own_TD.device)]]
        if self._begun:
            assert begun_TD is not None
            picked.insert(0, begun_TD[torch.tensor(list(self._begun), device=begun_TD.device)])
        return torch.cat(picked)

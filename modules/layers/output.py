"""From final hidden states to words: logits, and the loss without the logits of the whole batch.

Letters: T tokens, D model, V vocabulary.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from modules.functional.losses import linear_cross_entropy


class Output(Protocol):
    """What is done with the output head's matrix: the seam where a vocabulary may be shared out over processes."""

    def logits(self, hidden: Tensor, weight_VD: Tensor) -> Tensor:
        """Scores over the vocabulary [..., V] of final hidden states [..., D]."""
        ...

    def cross_entropy(
        self, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk_rows: int
    ) -> tuple[Tensor, Tensor]:
        """As `linear_cross_entropy`."""
        ...


class LocalOutput:
    """This process has the whole matrix."""

    def logits(self, hidden: Tensor, weight_VD: Tensor) -> Tensor:
        """Scores over the vocabulary."""
        return F.linear(hidden, weight_VD)

    def cross_entropy(
        self, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk_rows: int
    ) -> tuple[Tensor, Tensor]:
        """The sum of the losses in nats, and each of them."""
        return linear_cross_entropy(hidden_TD, weight_VD, targets_T, chunk_rows)

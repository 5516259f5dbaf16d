"""Figures of merit as torchmetrics: they add up over batches and, later, over ranks."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class BitsPerByte(Metric):
    """Cross-entropy in bits over the UTF-8 bytes that the targets spell: comparable across tokenizers."""

    full_state_update = False
    nats: Tensor
    num_bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_bytes", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, num_bytes: Tensor) -> None:
        """Add a sum of token losses in nats and the number of bytes that those tokens spell."""
        self.nats += nats.double()
        self.num_bytes += num_bytes.double()

    def compute(self) -> Tensor:
        """Bits per byte of all that was added."""
        return self.nats / self.num_bytes / math.log(2)

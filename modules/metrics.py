"""Figures of merit as torchmetrics: they add up over batches and over ranks."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class TextLoss(Metric):
    """Cross-entropy of text: per token, as perplexity, and in bits over the UTF-8 bytes that the targets spell, which
    is comparable across tokenizers."""

    full_state_update = False
    nats: Tensor
    num_tokens: Tensor
    num_bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "num_tokens", "num_bytes"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, num_tokens: int, num_bytes: Tensor) -> None:
        """Add a sum of token losses in nats, and the numbers of tokens and of bytes that these spell."""
        self.nats += nats.double()
        self.num_tokens += num_tokens
        self.num_bytes += num_bytes.double()

    def compute(self) -> dict[str, Tensor]:
        """`loss` in nats per token, `perplexity`, and `bpb`, bits per byte."""
        loss = self.nats / self.num_tokens
        return {"loss": loss, "perplexity": loss.exp(), "bpb": self.nats / self.num_bytes / math.log(2)}

"""The dense feed-forward layer."""

import torch.nn.functional as F
from torch import Tensor, nn

from modules.functional.routing import RoutingStats
from modules.layers.precision import to_compute


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x) (arXiv 2002.05202), from [B, L, D] to [B, L, D]."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, hidden_BLD: Tensor, decoding: bool = False) -> tuple[Tensor, RoutingStats | None]:
        """The layer's output; a dense layer has no routing to report, and decodes as it trains."""
        hidden_BLD = to_compute(hidden_BLD)
        return self.down(F.silu(self.gate(hidden_BLD)) * self.up(hidden_BLD)), None

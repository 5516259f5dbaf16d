"""The routed-expert layer: a router, E experts, and experts that every token visits.

Letters: B batch, L sequence, T tokens (B·L), D model, F hidden width of an expert, E experts, R rows of experts.
"""

import torch
from torch import Tensor, nn

from modules.config import ModelConfig
from modules.functional.routing import RoutingStats
from modules.layers.dispatch import Dispatcher, LocalDispatcher
from modules.layers.feedforward import FeedForward
from modules.layers.grouped import row_multiple, swiglu_experts
from modules.layers.precision import compute_dtype, to_compute
from modules.layers.router import Router


class Experts(nn.Module):
    """E SwiGLU feed-forwards whose weights are stacked: gate and up [E, D, F], down [E, F, D]."""

    def __init__(self, num_experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.up = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))

    def forward(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Expert e's output for its `counts_E[e]` rows; rows are sorted by expert."""
        return swiglu_experts(rows_RD, counts_E, self.gate, self.up, self.down)


class RoutedExperts(nn.Module):
    """A feed-forward layer of E experts of which each token visits a few."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.router = Router(config.dim, config.moe)
        self.experts = Experts(config.moe.num_experts, config.dim, config.expert_size)
        self.shared = FeedForward(config.dim, config.shared_size) if config.shared_size else None
        self.shared_gate = nn.Linear(config.dim, 1, bias=False) if config.moe.shared_gate else None
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(self, hidden_BLD: Tensor, decoding: bool = False) -> tuple[Tensor, RoutingStats]:
        """Route every token, and add up its experts' outputs weighted by their gates.

        Args:
            hidden_BLD: the layer's input.
            decoding: no token is dropped, whatever the capacity.

        Raises:
            InputError: expert choice while decoding; groups that do not divide the tokens in training.
        """
        num_experts, top_k = self.router.moe.num_experts, self.router.moe.top_k
        rows_per_expert = hidden_BLD.shape[0] * hidden_BLD.shape[1] * top_k // num_experts
        multiple = row_multiple(hidden_BLD.device, compute_dtype(hidden_BLD), rows_per_expert)
        plan, stats = self.router.route(hidden_BLD, decoding, multiple)
        hidden_TD = to_compute(hidden_BLD.flatten(0, 1))
        rows_RD, counts_E, context = self.dispatcher.dispatch(hidden_TD, plan)
        returning = self.dispatcher.send_back(self.experts(rows_RD, counts_E), context)
        shared_TD = None if self.shared is None else self._shared_output(hidden_TD)  # while rows are on their way
        mixed_TD = self.dispatcher.combine(returning, context)
        if shared_TD is not None:
            mixed_TD = mixed_TD + shared_TD
        return mixed_TD.view_as(hidden_BLD), stats

    def _shared_output(self, hidden_TD: Tensor) -> Tensor:
        assert self.shared is not None
        output_TD, _ = self.shared(hidden_TD)
        return output_TD if self.shared_gate is None else output_TD * self.shared_gate(hidden_TD).sigmoid()

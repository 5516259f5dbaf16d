"""The routed-expert layer: top-k routing, rows sorted by expert, grouped products, no token dropped.

Letters: B batch, L sequence, T tokens (B·L), D model, F hidden width of an expert, E experts, K experts per token,
R routed rows (T·K).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.config import ModelConfig
from modules.functional.routing import RoutingStats, route_top_k, routing_stats


class Experts(nn.Module):
    """E SwiGLU feed-forwards whose weights are stacked: gate and up [E, D, F], down [E, F, D]."""

    def __init__(self, num_experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.up = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))

    def forward(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Apply expert e to its `counts_E[e]` rows; rows are sorted by expert."""
        gate_RF = grouped_linear(rows_RD, self.gate, counts_E)
        up_RF = grouped_linear(rows_RD, self.up, counts_E)
        return grouped_linear(F.silu(gate_RF) * up_RF, self.down, counts_E)


class RoutedExperts(nn.Module):
    """A feed-forward layer of E experts of which each token visits K; dropless."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.top_k = config.moe.top_k
        self.renormalize = config.moe.renormalize
        self.num_experts = config.moe.num_experts
        self.router = nn.Linear(config.dim, config.moe.num_experts, bias=False)
        self.experts = Experts(config.moe.num_experts, config.dim, config.expert_size)

    def forward(self, hidden_BLD: Tensor) -> tuple[Tensor, RoutingStats]:
        """Route every token and add up its experts' outputs, weighted by their gates."""
        hidden_TD = hidden_BLD.flatten(0, 1)
        logits_TE = self._router_logits(hidden_TD)
        gates_TK, expert_ids_TK, probabilities_TE = route_top_k(logits_TE, self.top_k, self.renormalize)
        order_R = expert_ids_TK.flatten().argsort(stable=True)
        counts_E = torch.bincount(expert_ids_TK.flatten(), minlength=self.num_experts)
        rows_RD = self.experts(hidden_TD.index_select(0, order_R // self.top_k), counts_E)
        place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
        outputs_TKD = rows_RD.index_select(0, place_R).unflatten(0, (-1, self.top_k))
        mixed_TD = (outputs_TKD * gates_TK[..., None].to(outputs_TKD.dtype)).sum(dim=1)
        stats = routing_stats(logits_TE, probabilities_TE, counts_E)
        return mixed_TD.view_as(hidden_BLD), stats

    def _router_logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits in float32 or wider whatever the precision: near-ties decide where a token goes."""
        with torch.autocast(hidden_TD.device.type, enabled=False):
            wide = torch.promote_types(hidden_TD.dtype, torch.float32)
            return F.linear(hidden_TD.to(wide), self.router.weight.to(wide))


def grouped_linear(rows_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply each group of rows with its own matrix: rows sorted by group, `counts_E` rows in each.

    `F.grouped_mm` where it exists for the type; float64, which it lacks, goes group by group.
    """
    device_type = rows_RD.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        rows_RD, weight_EDF = rows_RD.to(dtype), weight_EDF.to(dtype)
    if rows_RD.dtype == torch.float64:
        groups = rows_RD.split(counts_E.tolist())
        return torch.cat([group @ weight for group, weight in zip(groups, weight_EDF, strict=True)])
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    return F.grouped_mm(rows_RD, weight_EDF, offs=offsets_E)

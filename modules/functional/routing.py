"""Top-k routing and its losses, as pure functions of the router's logits.

Letters: T tokens, E experts, K experts per token, R routed rows (T·K).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingStats:
    """What one routed layer reports for one forward pass. Losses carry gradient; the rest is detached.

    Shapes: scalars, except `tokens_per_expert_E`.
    """

    balance_loss: Tensor
    z_loss: Tensor
    tokens_per_expert_E: Tensor
    entropy: Tensor
    logit_rms: Tensor


def route_top_k(logits_TE: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Choose each token's experts: softmax over all experts, then top-k.

    Args:
        logits_TE: the router's logits in float32 or wider.
        top_k: experts per token.
        renormalize: divide the chosen probabilities by their sum.

    Returns:
        gates_TK, expert_ids_TK (largest probability first) and probabilities_TE.
    """
    probabilities_TE = logits_TE.softmax(dim=-1)
    gates_TK, expert_ids_TK = probabilities_TE.topk(top_k, dim=-1)
    if renormalize:
        gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True)
    return gates_TK, expert_ids_TK, probabilities_TE


def balance_loss(probabilities_TE: Tensor, counts_E: Tensor) -> Tensor:
    """Load-balancing loss over all k choices: E·Σ_e f_e·P_e, 1.0 when balanced and E when one expert takes all.

    f is the share of routed rows (no gradient), P the mean probability (Switch Transformer, arXiv 2101.03961,
    equation 4, with f over all top-k choices).
    """
    num_experts = probabilities_TE.shape[-1]
    share_E = counts_E.to(probabilities_TE.dtype) / counts_E.sum()
    return num_experts * torch.dot(share_E, probabilities_TE.mean(dim=0))


def z_loss(logits_TE: Tensor) -> Tensor:
    """Router z-loss: the mean squared log-partition (ST-MoE, arXiv 2202.08906, equation 5)."""
    return logits_TE.logsumexp(dim=-1).square().mean()


def routing_stats(logits_TE: Tensor, probabilities_TE: Tensor, counts_E: Tensor) -> RoutingStats:
    """Collect the losses and the figures that are watched, for one layer."""
    with torch.no_grad():
        entropy = -(probabilities_TE * probabilities_TE.clamp_min(1e-30).log()).sum(dim=-1).mean()
        logit_rms = logits_TE.square().mean().sqrt()
    return RoutingStats(
        balance_loss=balance_loss(probabilities_TE, counts_E),
        z_loss=z_loss(logits_TE),
        tokens_per_expert_E=counts_E.detach(),
        entropy=entropy,
        logit_rms=logit_rms,
    )

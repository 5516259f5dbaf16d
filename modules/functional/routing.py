"""Routing as pure functions of the router's logits: scores, choices, gates, slots, losses and what is watched.

Letters: B batch, L sequence, T tokens (B·L), E experts, K experts per token, G groups of tokens, S tokens per group
(T = G·S), C slots of an expert in a group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from modules.moe_config import MoEConfig, RouterConfig

GSHARD_EPSILON = 1e-9
"""Added to the sum of GShard's two gates (axlearn)."""
SIGMOID_EPSILON = 1e-20
"""Added to the sum of sigmoid scores (DeepSeek-V3)."""


@dataclass(frozen=True)
class Choice:
    """What tokens choose: experts, largest score first, and their gates (with gradient)."""

    expert_ids_TK: Tensor
    gates_TK: Tensor


@dataclass(frozen=True)
class ExpertChoice:
    """What experts choose in each group: tokens (numbered through the batch) and their gates (with gradient)."""

    token_ids_GEC: Tensor
    gates_GEC: Tensor


@dataclass(frozen=True)
class RoutingStats:
    """What one routed layer reports for one forward pass. Probabilities and z-loss carry gradient, the rest does not.

    Attributes:
        probabilities_GE: mean probability of each expert within each group that is balanced.
        fractions_GE: share of the choices that each expert got within each of these groups.
        z_loss: mean squared log-partition.
        tokens_per_expert_E: choices of each expert, before any is dropped (int64).
        dropped_K: share of the first, second, ... choices that found no slot. Under expert choice, where tokens choose
            nothing, every entry is the share of tokens that no expert took.
        entropy: mean entropy of a token's probabilities, in nats.
        logit_rms: root mean square of the logits.
    """

    probabilities_GE: Tensor
    fractions_GE: Tensor
    z_loss: Tensor
    tokens_per_expert_E: Tensor
    dropped_K: Tensor
    entropy: Tensor
    logit_rms: Tensor

    @property
    def balance_loss(self) -> Tensor:
        """Load-balancing loss: mean over groups of E·Σ_e f_e·P_e, 1.0 when balanced and E when one expert takes all.

        f is the share of choices (no gradient), P the mean probability: Switch Transformer, arXiv 2101.03961, equation
        4, with f over all top-k choices; GShard's E²·mean(f·P) over groups and experts is the same number with f over
        first choices.
        """
        num_experts = self.probabilities_GE.shape[-1]
        return num_experts * (self.fractions_GE * self.probabilities_GE).sum(dim=-1).mean()


def cap_logits(logits: Tensor, cap: float | None) -> Tensor:
    """Squeeze logits into (-cap, cap) by cap·tanh(logits / cap); None leaves them."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def scores_and_probabilities(logits_TE: Tensor, router: RouterConfig) -> tuple[Tensor, Tensor]:
    """A score for each expert, and the probabilities that the losses see; the same but for sigmoid scores."""
    if router.score != "sigmoid":
        probabilities_TE = logits_TE.softmax(dim=-1)
        return probabilities_TE, probabilities_TE
    scores_TE = logits_TE.sigmoid()
    return scores_TE, scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + SIGMOID_EPSILON)


def choose_experts(scores_TE: Tensor, moe: MoEConfig, bias_E: Tensor | None = None) -> Choice:
    """Each token takes its k best experts.

    Args:
        scores_TE: non-negative scores.
        moe: top_k, renormalize, and the router's groups, score and scale.
        bias_E: added to the scores for the choice only; gates come from the scores themselves (DeepSeek-V3, arXiv
            2412.19437, equation 16).
    """
    wanted_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    expert_ids_TK = _top_2(wanted_TE) if moe.router.kind == "gshard" else _top_k(wanted_TE, moe)
    gates_TK = scores_TE.gather(1, expert_ids_TK)
    if moe.renormalize:
        epsilon = GSHARD_EPSILON if moe.router.kind == "gshard" else SIGMOID_EPSILON
        gates_TK = gates_TK / (gates_TK.sum(dim=-1, keepdim=True) + epsilon)
    return Choice(expert_ids_TK, gates_TK * moe.router.gate_scale)


def choose_tokens(scores_TE: Tensor, moe: MoEConfig, group_size: int) -> ExpertChoice:
    """Each expert takes the C tokens of each group that score highest for it (arXiv 2202.09368, equation 2)."""
    assert moe.capacity is not None
    slots = moe.capacity.slots(group_size, moe.num_experts)
    scores_GES = scores_TE.unflatten(0, (-1, group_size)).transpose(1, 2)
    token_ids_GEC = scores_GES.detach().topk(slots, dim=-1).indices
    gates_GEC = scores_GES.gather(-1, token_ids_GEC) * moe.router.gate_scale
    first_G11 = torch.arange(len(scores_GES), device=scores_TE.device)[:, None, None] * group_size
    return ExpertChoice(token_ids_GEC + first_G11, gates_GEC)


def queue_positions(expert_ids_TK: Tensor, num_experts: int, group_size: int) -> Tensor:
    """The place [T, K] of each choice in its expert's queue within its group.

    First choices of all tokens queue before second ones, and earlier tokens before later ones: a choice has a slot when
    its place is below C. That is GShard's rule, where second choices begin behind the first choices that were kept.
    """
    top_k = expert_ids_TK.shape[1]
    by_choice_GKS = expert_ids_TK.unflatten(0, (-1, group_size)).transpose(1, 2)
    group_G11 = torch.arange(len(by_choice_GKS), device=expert_ids_TK.device)[:, None, None]
    queue_N = (by_choice_GKS + num_experts * group_G11).flatten()
    sorted_N, order_N = queue_N.sort(stable=True)
    place_N = torch.arange(len(queue_N), device=queue_N.device)
    place_N = place_N - torch.searchsorted(sorted_N, sorted_N)  # less the place where its own queue begins
    positions_N = torch.empty_like(place_N).scatter_(0, order_N, place_N)
    return positions_N.view(-1, top_k, group_size).transpose(1, 2).reshape(-1, top_k)


def count_choices(expert_ids: Tensor, num_experts: int) -> Tensor:
    """How often each expert is named (int64), without the host synchronisation of `torch.bincount`."""
    flat = expert_ids.flatten()
    return torch.zeros(num_experts, dtype=torch.long, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def choice_fractions(expert_ids_TK: Tensor, num_experts: int, num_groups: int) -> Tensor:
    """Share of the choices that each expert got [G, E] (float64), in equally large groups of consecutive tokens."""
    ids_GN = expert_ids_TK.reshape(num_groups, -1)
    group_G1 = torch.arange(num_groups, device=ids_GN.device)[:, None]
    counts = count_choices(ids_GN + num_experts * group_G1, num_groups * num_experts)
    return counts.view(num_groups, num_experts).double() / ids_GN.shape[1]


def z_loss(logits_TE: Tensor) -> Tensor:
    """Router z-loss: the mean squared log-partition (ST-MoE, arXiv 2202.08906, equation 5)."""
    return logits_TE.logsumexp(dim=-1).square().mean()


def mean_entropy(probabilities_TE: Tensor) -> Tensor:
    """Mean entropy of the tokens' probabilities, in nats."""
    return torch.special.entr(probabilities_TE).sum(dim=-1).mean()


def stats_of(
    logits_TE: Tensor, probabilities_TE: Tensor, fractions_GE: Tensor, counts_E: Tensor, dropped_K: Tensor
) -> RoutingStats:
    """Put together what a layer reports; the probabilities are averaged within the groups of the fractions."""
    groups_GSE = probabilities_TE.unflatten(0, (len(fractions_GE), -1))
    with torch.no_grad():
        entropy = mean_entropy(probabilities_TE)
        logit_rms = logits_TE.square().mean().sqrt()
    return RoutingStats(
        probabilities_GE=groups_GSE.mean(dim=1),
        fractions_GE=fractions_GE.to(probabilities_TE.dtype),
        z_loss=z_loss(logits_TE),
        tokens_per_expert_E=counts_E,
        dropped_K=dropped_K,
        entropy=entropy,
        logit_rms=logit_rms,
    )


def moved_bias(bias_E: Tensor, tokens_per_expert_E: Tensor, rate: float) -> Tensor:
    """The selection bias after a step: up by `rate` for experts below the mean load, down for those above.

    Auxiliary-loss-free balancing (arXiv 2408.15664, algorithm 1). Leading dimensions are layers.
    """
    load = tokens_per_expert_E.to(bias_E.dtype)
    return bias_E + rate * torch.sign(load.mean(dim=-1, keepdim=True) - load)


def _top_2(scores_TE: Tensor) -> Tensor:
    """The best expert and the best of the rest; of equals the first, as GShard's argmax has it."""
    first_T1 = scores_TE.argmax(dim=-1, keepdim=True)
    return torch.cat((first_T1, scores_TE.scatter(1, first_T1, -1.0).argmax(dim=-1, keepdim=True)), dim=1)


def _top_k(wanted_TE: Tensor, moe: MoEConfig) -> Tensor:
    """The k best experts; with groups of experts, among those of the groups whose two best add up to most."""
    router = moe.router
    if router.top_groups < router.expert_groups:
        wanted_TGM = wanted_TE.unflatten(1, (router.expert_groups, -1))
        group_scores_TG = wanted_TGM.topk(min(2, wanted_TGM.shape[2]), dim=-1).values.sum(dim=-1)
        open_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
        open_TG.scatter_(1, group_scores_TG.topk(router.top_groups, dim=-1).indices, True)
        wanted_TE = wanted_TGM.masked_fill(~open_TG[..., None], float("-inf")).flatten(1)
    return wanted_TE.topk(moe.top_k, dim=-1).indices

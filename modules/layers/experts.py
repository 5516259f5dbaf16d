"""The routed-expert layer: a router, E experts, and experts that every token visits.

Letters: B batch, L sequence, T tokens (B·L), D model, F hidden width of an expert, E experts, K experts per token,
R rows that experts work on, S tokens per group.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.config import ModelConfig
from modules.errors import InputError
from modules.functional import routing
from modules.functional.routing import RoutingStats
from modules.layers.dispatch import Dispatch, LocalDispatcher, dispatch_all, dispatch_chosen, dispatch_to_slots
from modules.layers.feedforward import FeedForward
from modules.layers.grouped import row_multiple, swiglu_experts
from modules.moe_config import check_groups


class Experts(nn.Module):
    """E SwiGLU feed-forwards whose weights are stacked: gate and up [E, D, F], down [E, F, D]."""

    def __init__(self, num_experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.up = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))

    def forward(self, rows_RD: Tensor, gates_R: Tensor, counts_E: Tensor) -> Tensor:
        """Expert e's output for its `counts_E[e]` rows, times their gates; rows are sorted by expert."""
        return swiglu_experts(rows_RD, gates_R, counts_E, self.gate, self.up, self.down)


class RoutedExperts(nn.Module):
    """A feed-forward layer of E experts of which each token visits a few."""

    selection_bias_E: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.moe = config.moe
        self.router = nn.Linear(config.dim, config.moe.num_experts, bias=False)
        self.experts = Experts(config.moe.num_experts, config.dim, config.expert_size)
        self.shared = FeedForward(config.dim, config.shared_size) if config.shared_size else None
        self.shared_gate = nn.Linear(config.dim, 1, bias=False) if config.moe.shared_gate else None
        bias_E = (
            torch.zeros(config.moe.num_experts, dtype=torch.float32) if config.moe.router.bias_update_rate else None
        )
        self.register_buffer("selection_bias_E", bias_E)
        self.dispatcher = LocalDispatcher()

    def _apply(self, fn: Any, recurse: bool = True) -> "RoutedExperts":
        """The bias stays in float32 when the layer is cast: its steps are too small for bfloat16."""
        before_E = self.selection_bias_E
        super()._apply(fn, recurse)
        if before_E is not None and self.selection_bias_E is not None and self.selection_bias_E.dtype != before_E.dtype:
            self.selection_bias_E = before_E.to(self.selection_bias_E.device)
        return self

    def forward(self, hidden_BLD: Tensor, decoding: bool = False) -> tuple[Tensor, RoutingStats]:
        """Route every token, and add up its experts' outputs weighted by their gates.

        Args:
            hidden_BLD: the layer's input.
            decoding: no token is dropped, whatever the capacity.

        Raises:
            InputError: expert choice while decoding; groups that do not divide the tokens in training.
        """
        hidden_TD = hidden_BLD.flatten(0, 1)
        logits_TE = self._router_logits(hidden_TD)
        scores_TE, probabilities_TE = routing.scores_and_probabilities(logits_TE, self.moe.router)
        plan, stats = self._route(logits_TE, scores_TE, probabilities_TE, hidden_BLD.shape[1], decoding)
        rows_RD = self.experts(self.dispatcher.dispatch(hidden_TD, plan), plan.gates_R, plan.counts_E)
        mixed_TD = self.dispatcher.combine(rows_RD, plan)
        if self.shared is not None:
            mixed_TD = mixed_TD + self._shared_output(hidden_TD)
        return mixed_TD.view_as(hidden_BLD), stats

    def _route(
        self, logits_TE: Tensor, scores_TE: Tensor, probabilities_TE: Tensor, seq_len: int, decoding: bool
    ) -> tuple[Dispatch, RoutingStats]:
        """Let tokens choose experts, or experts tokens; and report what came of it."""
        moe, num_tokens = self.moe, len(scores_TE)
        if moe.router.kind == "expert_choice":
            return self._route_chosen(logits_TE, scores_TE, probabilities_TE, seq_len, decoding)
        choice = routing.choose_experts(scores_TE, moe, self.selection_bias_E)
        dropped_K = scores_TE.new_zeros(moe.top_k)
        group_size = self._group_size(num_tokens, seq_len)
        if moe.capacity is None or decoding or not (self.training or moe.capacity.at_evaluation):
            plan = dispatch_all(choice, moe.num_experts, row_multiple(self.experts.gate))
        else:
            slots = moe.capacity.slots(group_size, moe.num_experts)
            positions_TK = routing.queue_positions(choice.expert_ids_TK, moe.num_experts, group_size)
            plan = dispatch_to_slots(choice, positions_TK, moe.num_experts, group_size, slots)
            dropped_K = (positions_TK >= slots).to(scores_TE.dtype).mean(dim=0)
        balanced = {"sequence": seq_len, "group": group_size}.get(moe.level, num_tokens)
        seen_TK = choice.expert_ids_TK[:, :1] if moe.router.kind == "gshard" else choice.expert_ids_TK
        fractions_GE = routing.choice_fractions(seen_TK, moe.num_experts, num_tokens // balanced)
        counts_E = routing.count_choices(choice.expert_ids_TK, moe.num_experts)
        return plan, _stats(logits_TE, probabilities_TE, fractions_GE, counts_E, dropped_K)

    def _route_chosen(
        self, logits_TE: Tensor, scores_TE: Tensor, probabilities_TE: Tensor, seq_len: int, decoding: bool
    ) -> tuple[Dispatch, RoutingStats]:
        if decoding:
            raise InputError(
                "router.kind=expert_choice cannot decode: whether an expert takes a token depends on later tokens; "
                "train with a router of kind top_k or gshard to generate or to evaluate tasks"
            )
        moe, num_tokens = self.moe, len(scores_TE)
        choice = routing.choose_tokens(scores_TE, moe, self._group_size(num_tokens, seq_len))
        plan = dispatch_chosen(choice, num_tokens)
        visits_T = routing.count_choices(choice.token_ids_GEC, num_tokens)
        missed_K = (visits_T == 0).to(scores_TE.dtype).mean().expand(moe.top_k)
        fractions_GE = (plan.counts_E.double() / plan.counts_E.sum())[None]
        return plan, _stats(logits_TE, probabilities_TE, fractions_GE, plan.counts_E, missed_K)

    def _group_size(self, num_tokens: int, seq_len: int) -> int:
        """Tokens of a group; a sequence where nothing else is configured, or where that does not divide the tokens."""
        if self.training:
            check_groups(self.moe, num_tokens)
        size = (self.moe.capacity.group_size if self.moe.capacity else None) or seq_len
        return seq_len if num_tokens % size else size

    def _shared_output(self, hidden_TD: Tensor) -> Tensor:
        assert self.shared is not None
        output_TD, _ = self.shared(hidden_TD)
        return output_TD if self.shared_gate is None else output_TD * self.shared_gate(hidden_TD).sigmoid()

    def _router_logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits in float32 or wider whatever the precision: near-ties decide where a token goes."""
        with torch.autocast(hidden_TD.device.type, enabled=False):
            wide = torch.promote_types(hidden_TD.dtype, torch.float32)
            logits_TE = F.linear(hidden_TD.to(wide), self.router.weight.to(wide))
            return routing.cap_logits(logits_TE, self.moe.router.soft_cap)


def _stats(
    logits_TE: Tensor, probabilities_TE: Tensor, fractions_GE: Tensor, counts_E: Tensor, dropped_K: Tensor
) -> RoutingStats:
    groups_GSE = probabilities_TE.unflatten(0, (len(fractions_GE), -1))
    with torch.no_grad():
        entropy = routing.mean_entropy(probabilities_TE)
        logit_rms = logits_TE.square().mean().sqrt()
    return RoutingStats(
        probabilities_GE=groups_GSE.mean(dim=1),
        fractions_GE=fractions_GE.to(probabilities_TE.dtype),
        z_loss=routing.z_loss(logits_TE),
        tokens_per_expert_E=counts_E,
        dropped_K=dropped_K,
        entropy=entropy,
        logit_rms=logit_rms,
    )

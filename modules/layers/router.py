"""The router: which tokens go to which experts, in float32 or wider, and what came of it.

Letters: B batch, L sequence, T tokens (B·L), D model, E experts, K experts per token, G groups of tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.errors import InputError
from modules.functional import routing
from modules.functional.routing import RoutingStats
from modules.layers.dispatch import Dispatch, dispatch_all, dispatch_chosen, dispatch_to_slots
from modules.moe_config import MoEConfig, check_groups


class Router(nn.Linear):
    """Scores tokens by one matrix [E, D], and lets tokens choose experts or experts tokens.

    Attributes:
        selection_bias_E: added to the scores for the choice alone; moved by whoever trains. None without it.
    """

    selection_bias_E: Tensor | None

    def __init__(self, dim: int, moe: MoEConfig) -> None:
        super().__init__(dim, moe.num_experts, bias=False)
        self.moe = moe
        bias_E = torch.zeros(moe.num_experts, dtype=torch.float32) if moe.router.bias_update_rate else None
        self.register_buffer("selection_bias_E", bias_E)

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        """The bias stays in float32 when the layer is cast: its steps are too small for bfloat16."""
        before_E = self.selection_bias_E
        super()._apply(fn, recurse)
        if before_E is not None and self.selection_bias_E is not None and self.selection_bias_E.dtype != before_E.dtype:
            self.selection_bias_E = before_E.to(self.selection_bias_E.device)
        return self

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Logits in float32 or wider whatever the precision: near-ties decide where a token goes."""
        with torch.autocast(hidden_TD.device.type, enabled=False):
            wide = torch.promote_types(hidden_TD.dtype, torch.float32)
            logits_TE = F.linear(hidden_TD.to(wide), self.weight.to(wide))
            return routing.cap_logits(logits_TE, self.moe.router.soft_cap)

    def route(self, hidden_BLD: Tensor, decoding: bool = False, row_multiple: int = 1) -> tuple[Dispatch, RoutingStats]:
        """Decide which rows experts work on.

        Args:
            hidden_BLD: the layer's input.
            decoding: no token is dropped, whatever the capacity.
            row_multiple: as in `dispatch_all`.

        Raises:
            InputError: expert choice while decoding; groups that do not divide the tokens in training.
        """
        if self.training:
            check_groups(self.moe, hidden_BLD.shape[0] * hidden_BLD.shape[1])
        logits_TE = self(hidden_BLD.flatten(0, 1))
        scores_TE, probabilities_TE = routing.scores_and_probabilities(logits_TE, self.moe.router)
        if self.moe.router.kind == "expert_choice":
            plan, seen = self._let_experts_choose(scores_TE, hidden_BLD.shape[1], decoding)
        else:
            plan, seen = self._let_tokens_choose(scores_TE, hidden_BLD.shape[1], decoding, row_multiple)
        return plan, routing.stats_of(logits_TE, probabilities_TE, *seen)

    def _let_tokens_choose(
        self, scores_TE: Tensor, seq_len: int, decoding: bool, row_multiple: int
    ) -> tuple[Dispatch, tuple[Tensor, Tensor, Tensor]]:
        """Rows, and fractions [G, E], choices of each expert [E] and dropped shares [K]."""
        moe, num_tokens = self.moe, len(scores_TE)
        choice = routing.choose_experts(scores_TE, moe, self.selection_bias_E)
        group_size = self._group_size(num_tokens, seq_len)
        if moe.capacity is None or decoding or not (self.training or moe.capacity.at_evaluation):
            plan = dispatch_all(choice, moe.num_experts, row_multiple)
            dropped_K = scores_TE.new_zeros(moe.top_k)
        else:
            slots = moe.capacity.slots(group_size, moe.num_experts)
            positions_TK = routing.queue_positions(choice.expert_ids_TK, moe.num_experts, group_size)
            plan = dispatch_to_slots(choice, positions_TK, moe.num_experts, group_size, slots)
            dropped_K = (positions_TK >= slots).to(scores_TE.dtype).mean(dim=0)
        balanced = {"sequence": seq_len, "group": group_size}.get(moe.level, num_tokens)
        seen_TK = choice.expert_ids_TK[:, :1] if moe.router.kind == "gshard" else choice.expert_ids_TK
        fractions_GE = routing.choice_fractions(seen_TK, moe.num_experts, num_tokens // balanced)
        return plan, (fractions_GE, routing.count_choices(choice.expert_ids_TK, moe.num_experts), dropped_K)

    def _let_experts_choose(
        self, scores_TE: Tensor, seq_len: int, decoding: bool
    ) -> tuple[Dispatch, tuple[Tensor, Tensor, Tensor]]:
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
        return plan, ((plan.counts_E.double() / plan.counts_E.sum())[None], plan.counts_E, missed_K)

    def _group_size(self, num_tokens: int, seq_len: int) -> int:
        """Tokens of a group; a sequence where nothing else is configured, or where that does not divide the tokens."""
        size = (self.moe.capacity.group_size if self.moe.capacity else None) or seq_len
        return seq_len if num_tokens % size else size

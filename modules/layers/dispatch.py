"""Which rows experts work on, and how rows leave the tokens and come back to them: by index, in a fixed order.

Letters: T tokens, D model, E experts, K experts per token, R rows that experts work on, N places that are added up.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from modules.functional.routing import Choice, ExpertChoice, count_choices

DOT_ROWS = 4096
"""Rows that are multiplied at a time where only their sums are wanted."""


@dataclass(frozen=True)
class Dispatch:
    """Rows for experts, sorted by expert, and where each token finds its rows again.

    Attributes:
        token_ids_R: the token that each row is a copy of.
        gates_R: the row's gate, with gradient; 0 for a row that only fills a slot.
        counts_E: rows of each expert.
        rows_N: the rows of token 0, then those of token 1, ...
        offsets_T: where each token's rows begin in `rows_N`.
        live_N: 1 where a place of `rows_N` counts, 0 where it stands for a dropped choice; None when all count.
        slots: the rows of each expert, where all have equally many whatever the loads.
    """

    token_ids_R: Tensor
    gates_R: Tensor
    counts_E: Tensor
    rows_N: Tensor
    offsets_T: Tensor
    live_N: Tensor | None = None
    slots: int | None = None


def dispatch_all(choice: Choice, num_experts: int, row_multiple: int = 1) -> Dispatch:
    """Every choice becomes a row, R = T·K.

    Args:
        row_multiple: above 1, filler rows bring each expert's rows to a multiple; R then depends on the loads, which
            the host has to know.
    """
    expert_ids_N = choice.expert_ids_TK.flatten()
    sorted_N, order_N = expert_ids_N.sort(stable=True)
    counts_E = count_choices(expert_ids_N, num_experts)
    rows_E = (counts_E + row_multiple - 1) // row_multiple * row_multiple
    shift_E = (rows_E - counts_E).cumsum(0) - (rows_E - counts_E)  # filler in front of each expert's rows
    row_of_sorted_N = torch.arange(len(order_N), device=order_N.device) + shift_E.index_select(0, sorted_N)
    row_N = torch.empty_like(order_N).scatter_(0, order_N, row_of_sorted_N)
    num_rows = len(row_N) if row_multiple == 1 else int(rows_E.sum())
    return _rows_at(choice, row_N, None, num_rows, rows_E)


def dispatch_to_slots(choice: Choice, positions_TK: Tensor, num_experts: int, group_size: int, slots: int) -> Dispatch:
    """Choices that find a slot become rows: R = E·G·C whatever the loads, so no host has to know what was dropped."""
    num_groups = len(positions_TK) // group_size
    group_T1 = (torch.arange(len(positions_TK), device=positions_TK.device) // group_size)[:, None]
    row_N = ((choice.expert_ids_TK * num_groups + group_T1) * slots + positions_TK).flatten()
    kept_N = (positions_TK < slots).flatten()
    counts_E = torch.full((num_experts,), num_groups * slots, device=row_N.device)
    plan = _rows_at(choice, row_N, kept_N, num_experts * num_groups * slots, counts_E)
    return replace(plan, slots=num_groups * slots)


def dispatch_chosen(choice: ExpertChoice, num_tokens: int) -> Dispatch:
    """Expert choice: E·G·C rows, and tokens with any number of them, none included."""
    token_ids_R = choice.token_ids_GEC.transpose(0, 1).flatten()
    sorted_N, rows_N = token_ids_R.sort(stable=True)
    num_groups, num_experts, slots = choice.token_ids_GEC.shape
    return Dispatch(
        token_ids_R=token_ids_R,
        gates_R=choice.gates_GEC.transpose(0, 1).flatten(),
        counts_E=torch.full((num_experts,), num_groups * slots, device=rows_N.device),
        rows_N=rows_N,
        offsets_T=torch.searchsorted(sorted_N, torch.arange(num_tokens, device=rows_N.device)),
        slots=num_groups * slots,
    )


class Dispatcher(Protocol):
    """How rows come to experts and back: the seam where expert parallelism exchanges them between processes."""

    def dispatch(self, hidden_TD: Tensor, plan: Dispatch) -> tuple[Tensor, Tensor, Any]:
        """Rows for the experts at hand, sorted by expert; how many each of them has; and what `combine` needs."""
        ...

    def send_back(self, rows_RD: Tensor, context: Any) -> Any:
        """Begin to bring the experts' outputs back to their tokens; what `combine` takes. It may go on meanwhile."""
        ...

    def combine(self, returning: Any, context: Any) -> Tensor:
        """Add the outputs for each token up [T, D], multiplied by their gates."""
        ...


class LocalDispatcher:
    """Rows go to experts of the same process."""

    def dispatch(self, hidden_TD: Tensor, plan: Dispatch) -> tuple[Tensor, Tensor, Dispatch]:
        """Copy tokens into rows [R, D], sorted by expert."""
        return _Gather.apply(hidden_TD, plan), plan.counts_E, plan

    def send_back(self, rows_RD: Tensor, plan: Dispatch) -> Tensor:
        """They are here."""
        return rows_RD

    def combine(self, returning: Tensor, plan: Dispatch) -> Tensor:
        """Add the rows of each token up [T, D], multiplied by their gates."""
        return _Combine.apply(returning, plan.gates_R.to(returning.dtype), plan)


class _Gather(torch.autograd.Function):
    """Its backward adds in a fixed order; that of `index_select` would not, on an accelerator."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, plan: Dispatch) -> Tensor:
        ctx.plan = plan
        return hidden_TD.index_select(0, plan.token_ids_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum_by_token(grads[0], ctx.plan), None


class _Combine(torch.autograd.Function):
    """Gates are applied where rows are added up: to D numbers a row and not to F, in a pass that is made anyway."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, gates_R: Tensor, plan: Dispatch) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(rows_RD, gates_R)
        return _sum_by_token(rows_RD, plan, gates_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_RD, gates_R = ctx.saved_tensors
        token_ids_R = ctx.plan.token_ids_R
        slope_TD = grads[0].contiguous()
        each_R = torch.arange(len(token_ids_R), device=token_ids_R.device)
        d_rows_RD = F.embedding_bag(token_ids_R, slope_TD, each_R, mode="sum", per_sample_weights=gates_R)
        return d_rows_RD, _dot_rows(rows_RD, slope_TD, token_ids_R), None


def _sum_by_token(rows_RD: Tensor, plan: Dispatch, gates_R: Tensor | None = None) -> Tensor:
    """Sum the rows of each token, of those that count, each times its gate where there are gates."""
    weights_N = None if gates_R is None else gates_R.index_select(0, plan.rows_N)
    if plan.live_N is not None:
        live_N = plan.live_N.to(rows_RD.dtype)
        weights_N = live_N if weights_N is None else weights_N * live_N
    return F.embedding_bag(plan.rows_N, rows_RD, plan.offsets_T, mode="sum", per_sample_weights=weights_N)


def _dot_rows(rows_RD: Tensor, slope_TD: Tensor, token_ids_R: Tensor) -> Tensor:
    """The dot product [R] of each row and the slope of its token; some rows at a time, for all products need memory."""
    pairs = zip(rows_RD.split(DOT_ROWS), token_ids_R.split(DOT_ROWS), strict=True)
    return torch.cat([torch.linalg.vecdot(rows, slope_TD.index_select(0, ids)) for rows, ids in pairs])


def _rows_at(choice: Choice, row_N: Tensor, kept_N: Tensor | None, num_rows: int, counts_E: Tensor) -> Dispatch:
    """Put each kept choice into its row. A row that no choice takes repeats token 0 with gate 0, and so adds nothing,
    forward or backward."""
    num_tokens, top_k = choice.expert_ids_TK.shape
    place_N = row_N if kept_N is None else row_N.masked_fill(~kept_N, num_rows)  # dropped choices share a place behind
    choice_R = torch.full((num_rows + 1,), -1, dtype=torch.long, device=row_N.device)
    choice_R = choice_R.scatter_(0, place_N, torch.arange(len(row_N), device=row_N.device))[:num_rows]
    gates_R = choice.gates_TK.flatten().index_select(0, choice_R.clamp_min(0)) * (choice_R >= 0)
    return Dispatch(
        token_ids_R=choice_R.clamp_min(0) // top_k,
        gates_R=gates_R,
        counts_E=counts_E,
        rows_N=place_N if kept_N is None else place_N.clamp_max(num_rows - 1),
        offsets_T=torch.arange(num_tokens, device=row_N.device) * top_k,
        live_N=kept_N,
    )

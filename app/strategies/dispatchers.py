"""Rows to experts of other processes, and back: expert parallelism, and experts whose channels are shared out.

Letters: T tokens, D model, R rows of this process's tokens, X rows of this process's experts, E experts, P processes,
M experts of each process (E = P·M).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd, wait_tensor
from torch.distributed.device_mesh import DeviceMesh

from app.strategies.vocabulary import sum_gradients, sum_parts
from modules.layers.dispatch import Dispatch, Dispatcher, LocalDispatcher


@dataclass(frozen=True)
class Exchange:
    """Where rows went.

    Attributes:
        plan: of this process's tokens.
        sent_P, received_P: rows to and from each process, known to the host.
        order_X: the received row that stands at each place once rows are sorted by expert.
    """

    plan: Dispatch
    sent_P: list[int]
    received_P: list[int]
    order_X: Tensor


class AllToAllDispatcher:
    """Each process sends every row to the process that holds its expert; two exchanges forward, two backward.

    Rows are on their way back while shared experts compute, and so are their gradients.

    Dropless rows go in parts of any size, which the host has to know: it waits for the device once. Where every expert
    has equally many slots on every process, sizes are known, and nothing waits.

    Args:
        group: the processes that share out experts, in the order of their experts.
        num_experts: of the layer (E).
        static_shapes: rely on equally many tokens on every process where slots are equally many; on CPUs, where waiting
            costs nothing, sizes are exchanged.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int, static_shapes: bool | None = None) -> None:
        self.group = group
        self.num_processes = group.size()
        self.num_experts = num_experts
        self.static_shapes = static_shapes
        self._local = LocalDispatcher()

    def dispatch(self, hidden_TD: Tensor, plan: Dispatch) -> tuple[Tensor, Tensor, Exchange]:
        """Rows [X, D] of this process's experts, sorted by expert, and their counts [M]."""
        rows_RD, counts_E, _ = self._local.dispatch(hidden_TD, plan)
        counts_PM, exchange = self._exchange_counts(counts_E, plan)
        received_XD = all_to_all_single_autograd(rows_RD.contiguous(), exchange.received_P, exchange.sent_P, self.group)
        return _Reorder.apply(received_XD, exchange.order_X), counts_PM.sum(dim=0), exchange

    def send_back(self, rows_XD: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
        """Rows in the order in which they came, and those [R, D] that are on their way from other processes."""
        inverse_X = torch.empty_like(exchange.order_X)
        inverse_X[exchange.order_X] = torch.arange(len(inverse_X), device=inverse_X.device)
        sent_XD = _Reorder.apply(rows_XD, inverse_X)
        arriving_RD = all_to_all_single(sent_XD.detach().contiguous(), exchange.sent_P, exchange.received_P, self.group)
        return sent_XD, arriving_RD

    def combine(self, returning: tuple[Tensor, Tensor], exchange: Exchange) -> Tensor:
        """Wait for the rows, and add up those of each token [T, D], multiplied by their gates."""
        sent_XD, arriving_RD = returning
        return self._local.combine(_Arrive.apply(sent_XD, arriving_RD, exchange, self.group), exchange.plan)

    def _exchange_counts(self, counts_E: Tensor, plan: Dispatch) -> tuple[Tensor, Exchange]:
        """Rows of each of this process's experts from each process [P, M], and what follows from them."""
        static = self.static_shapes if self.static_shapes is not None else counts_E.device.type != "cpu"
        per_process = self.num_experts // self.num_processes
        sent_PM = counts_E.view(self.num_processes, per_process)
        if static and plan.slots is not None:
            counts_PM = torch.full_like(sent_PM, plan.slots)
            sent = received = [plan.slots * per_process] * self.num_processes
        else:
            counts_PM = all_to_all_single(counts_E.contiguous(), None, None, self.group).view_as(sent_PM)
            sent, received = torch.stack((sent_PM.sum(dim=1), counts_PM.sum(dim=1))).tolist()
        experts_N = torch.arange(per_process, device=counts_E.device).repeat(self.num_processes)
        expert_X = experts_N.repeat_interleave(counts_PM.flatten(), output_size=sum(received))
        return counts_PM, Exchange(plan, sent, received, expert_X.argsort(stable=True))


class ChannelDispatcher:
    """Experts of which this process has some channels of each: what they put out is a part of a sum.

    The parts are added up behind the experts' combination, T rows instead of K·T; the gradients of inputs and gates,
    too, are sums.
    """

    def __init__(self, inner: Dispatcher, tp: DeviceMesh) -> None:
        self.inner, self.tp = inner, tp

    def dispatch(self, hidden_TD: Tensor, plan: Dispatch) -> tuple[Tensor, Tensor, Any]:
        """Rows and counts of the dispatcher inside."""
        plan = replace(plan, gates_R=sum_gradients(plan.gates_R, self.tp))
        return self.inner.dispatch(sum_gradients(hidden_TD, self.tp), plan)

    def send_back(self, rows_RD: Tensor, context: Any) -> Any:
        """What the dispatcher inside sends."""
        return self.inner.send_back(rows_RD, context)

    def combine(self, returning: Any, context: Any) -> Tensor:
        """Outputs of all channels [T, D]."""
        return sum_parts(self.inner.combine(returning, context), self.tp)


class _Arrive(torch.autograd.Function):
    """The end of an exchange that was begun before. Its backward begins one, for which the gradient's user waits."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, arriving: Tensor, exchange: Exchange, group: dist.ProcessGroup) -> Tensor:
        ctx.exchange, ctx.group = exchange, group
        return wait_tensor(arriving)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        sizes = ctx.exchange.received_P, ctx.exchange.sent_P
        return all_to_all_single(grads[0].contiguous(), *sizes, ctx.group), None, None, None


class _Reorder(torch.autograd.Function):
    """Rows in another order; its backward puts them back, where that of `index_select` would add them up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return torch.empty_like(grads[0]).index_copy_(0, order, grads[0]), None

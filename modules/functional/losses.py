"""Cross-entropy of a large vocabulary without the logits of the whole batch.

Letters: T tokens, D model, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
"""A target with this id counts for nothing."""
CACHED_ROWS = 32
"""Rows of logits that go through softmax together on a CPU: 4 MB in float32 at 32,000 words."""

WIDENED_ROWS = 1024
"""Rows of a product that are added to a wider total together on a CPU, where torch first makes a wide copy of them."""

LossesAndGradient = Callable[[Tensor, Tensor, torch.dtype], Tensor]
"""From logits, targets and a wide type to losses; the logits become the gradient of their sum."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are formed chunk by chunk in the forward pass, so that all chunks' logits can have one buffer.

    One product less than recomputing under a checkpoint, and at most `chunk_rows` x V logits alive at once. The weight
    is cast here, so that its gradient, summed over chunks in float32, reaches a float32 weight without being rounded.
    Backward runs once: a second one (`retain_graph`) is refused by autograd. Its plain twin is in tests/reference.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        chunk_rows: int,
        losses_and_gradient: LossesAndGradient,
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        ctx.weight_dtype, weight_VD = weight_VD.dtype, weight_VD.to(hidden_TD.dtype)
        losses_T = torch.empty(len(targets_T), dtype=wide, device=hidden_TD.device)
        hidden_grad = torch.empty_like(hidden_TD) if wants_hidden else None
        weight_grad = torch.zeros_like(weight_VD, dtype=wide) if wants_weight else None
        logits_CV = hidden_TD.new_empty(min(chunk_rows, len(targets_T)), len(weight_VD))
        counts_T1 = (targets_T != IGNORE_INDEX)[:, None]
        for start in range(0, len(targets_T), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = torch.mm(hidden_TD[rows], weight_VD.T, out=logits_CV[: len(targets_T[rows])])
            losses_T[rows] = losses_and_gradient(logits, targets_T[rows], wide)
            slope = logits  # which is now the gradient, but for rows that count for nothing
            if hidden_grad is not None:
                torch.mm(slope, weight_VD, out=hidden_grad[rows]).mul_(counts_T1[rows])
            if weight_grad is not None:
                _add_product(weight_grad, slope.T, hidden_TD[rows] * counts_T1[rows])
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.mark_non_differentiable(losses_T)
        return losses_T.sum(), losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        scale = grads[0]
        hidden_grad, weight_grad = ctx.saved_tensors  # which are scaled where they lie, and so can be had once
        return (
            None if hidden_grad is None else hidden_grad.mul_(scale.to(hidden_grad.dtype)),
            None if weight_grad is None else weight_grad.mul_(scale).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product to a total that may be wider."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
        return
    step = WIDENED_ROWS if total.device.type == "cpu" else len(total)
    for part, rows in zip(total.split(step), (left @ right).split(step), strict=True):
        part.add_(rows)


def losses_and_gradient(logits_TV: Tensor, targets_T: Tensor, wide: torch.dtype) -> Tensor:
    """The rows' losses; their logits are overwritten by the gradient of the losses, softmax minus one-hot.

    A few rows at a time, in `wide`, so that on a CPU all passes but the first read from its cache. The largest logit
    and its probability give the log-partition, and so the losses: one exponential of each logit instead of two.
    """
    losses_T = torch.empty(len(targets_T), dtype=wide, device=logits_TV.device)
    step = CACHED_ROWS if logits_TV.device.type == "cpu" else len(targets_T)
    for start in range(0, len(targets_T), step):
        rows = slice(start, start + step)
        target_T1 = targets_T[rows].clamp_min(0)[:, None]
        wide_logits = logits_TV[rows].to(wide)
        gradient = wide_logits.softmax(dim=-1)
        top_T1, top_probability_T1 = wide_logits.amax(dim=-1, keepdim=True), gradient.amax(dim=-1, keepdim=True)
        losses_T[rows] = (top_T1 - wide_logits.gather(1, target_T1) - top_probability_T1.log())[:, 0]
        gradient.scatter_add_(1, target_T1, gradient.new_full((), -1.0).expand(len(gradient), 1))
        logits_TV[rows] = gradient
    return losses_T.masked_fill_(targets_T == IGNORE_INDEX, 0.0)


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    chunk_rows: int = 1024,
    losses_and_gradient: LossesAndGradient = losses_and_gradient,
) -> tuple[Tensor, Tensor]:
    """Sum of the targets' negative log-likelihoods under softmax(hidden @ weight.T), in nats.

    Args:
        hidden_TD: final hidden states; under autocast they are cast to its type, as a linear layer's input would be.
        weight_VD: the output head, which is cast to the type of hidden states.
        targets_T: target ids; `IGNORE_INDEX` counts for nothing.
        chunk_rows: rows whose logits exist at one time.
        losses_and_gradient: of a chunk's logits; another one where no process has the logits of all words.

    Returns:
        The sum (float32 or wider, differentiable) and the loss of each token (detached).
    """
    device_type = hidden_TD.device.type
    if torch.is_autocast_enabled(device_type):
        hidden_TD = hidden_TD.to(torch.get_autocast_dtype(device_type))
    with torch.autocast(device_type, enabled=False):
        total, losses_T = _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, targets_T, chunk_rows, losses_and_gradient)
    return total, losses_T.detach()

"""Root-mean-square normalisation.

Letters: T everything but the last dimension, D the last one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.RMSNorm):
    """torch's, which on CPUs is composed of many passes; these take half of its time (docs/log.md)."""

    def forward(self, hidden: Tensor) -> Tensor:
        """x / sqrt(mean x² + eps) · weight over the last dimension (arXiv 1910.07467)."""
        return rms_norm(hidden, self.weight, self.eps)


def rms_norm(hidden: Tensor, weight_D: Tensor, eps: float | None) -> Tensor:
    """x / sqrt(mean x² + eps) · weight over the last dimension."""
    one_type = hidden.dtype == weight_D.dtype in (torch.float32, torch.float64)
    if hidden.device.type != "cpu" or not one_type or eps is None:
        return F.rms_norm(hidden, weight_D.shape, weight_D, eps)
    return _RMSNorm.apply(hidden, weight_D, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps the normalised rows, which is all that backward needs of the input."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).square_() / hidden.shape[-1]
        scale = mean_square.add_(eps).rsqrt_()
        normed = hidden * scale
        ctx.save_for_backward(normed, weight_D, scale)
        return normed * weight_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, weight_D, scale = ctx.saved_tensors
        product = grads[0] * normed
        product_TD = product.reshape(-1, len(weight_D))
        d_weight_D = product_TD.sum(dim=0)
        along = product_TD.mv(weight_D).view_as(scale).div_(len(weight_D))  # of the gradient, what only stretches rows
        d_hidden = torch.mul(grads[0], weight_D, out=product).addcmul_(normed, along, value=-1).mul_(scale)
        return d_hidden, d_weight_D, None

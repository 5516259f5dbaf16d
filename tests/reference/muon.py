"""One step of Muon by singular values, in float64: the iteration's polynomial acts on each of them alone."""

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalized(matrix: Tensor) -> Tensor:
    """U p⁵(σ / |σ|) Vᵀ of a matrix [A, B] with singular values σ, p(x) = a x + b x³ + c x⁵."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = A * values + B * values**3 + C * values**5
    return left @ torch.diag(values) @ right


class Muon:
    """A matrix and its momentum, stepped by the rule of Moonlight (arXiv 2502.16982, equation 4) with Nesterov."""

    def __init__(self, weight: Tensor, lr: float, decay: float, momentum: float) -> None:
        self.weight, self.lr, self.decay, self.momentum = weight.double().clone(), lr, decay, momentum
        self.buffer = torch.zeros_like(self.weight)

    def step(self, gradient: Tensor) -> None:
        """Torch's form of the momentum: a mean, not a sum."""
        self.buffer = self.momentum * self.buffer + (1 - self.momentum) * gradient
        ahead = self.momentum * self.buffer + (1 - self.momentum) * gradient
        size = 0.2 * max(self.weight.shape) ** 0.5
        self.weight = (1 - self.lr * self.decay) * self.weight - self.lr * size * orthogonalized(ahead)

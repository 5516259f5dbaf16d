"""Muon for the hidden matrices, AdamW for everything else, in one optimizer.

Muon (https://kellerjordan.github.io/posts/muon) makes the singular values of a matrix's momentum nearly equal before
the step. Its steps are scaled to the size of AdamW's (Moonlight, arXiv 2502.16982), so that one learning rate and one
weight decay serve both. Torch's own takes no experts [E, in, out]; here each expert is a matrix of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modules.grown_adamw import BIRTHS, GrownAdamW, is_grown_up, warmed_rates

MOMENTUM = "momentum_buffer"
"""Key of a matrix's optimizer state: its momentum; `step` counts its updates."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
TINY = 1e-7

ADAMW_SIZE = 0.2
"""Root mean square of AdamW's steps in training, which Muon's are given: times the root of the longer side, since an
orthogonal matrix [A, B] has a root mean square of 1 / sqrt(max(A, B))."""


class MuonAdamW(GrownAdamW):
    """Muon for the groups whose `is_muon` is true, `GrownAdamW` for the others.

    Where processes share parameters out, each of them orthogonalizes whole matrices, and keeps its part of the update.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["is_muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            for parameter in group["params"]:
                if group["is_muon"] and parameter.grad is not None:
                    self._step_matrix(group, parameter, parameter.grad)
        return loss

    def _step_matrix(self, group: Mapping[str, Any], parameter: Tensor, grad: Tensor) -> None:
        """Momentum with Nesterov's look ahead, orthogonalized; entries that came later may have a rate of their own."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state[MOMENTUM] = torch.zeros_like(parameter)
        state["step"] += 1
        momentum = group["momentum"]
        buffer = state[MOMENTUM].lerp_(grad, 1 - momentum)
        region = self.world.region(parameter)
        update = orthogonalized(self.world.whole(grad.lerp(buffer, momentum)))
        rate = group["lr"]
        if state.get(BIRTHS):
            count = float(state["step"])
            rate = rate * warmed_rates(torch.empty_like(update, dtype=parameter.dtype), state[BIRTHS], count)[region]
            state[BIRTHS] = [birth for birth in state[BIRTHS] if not is_grown_up(birth, count, momentum)]
        size = ADAMW_SIZE * max(parameter.shape[-2:]) ** 0.5
        update = update[region].to(parameter.dtype) * (size * rate)
        self.world.local(parameter).mul_(1 - rate * group["weight_decay"]).sub_(update)


def orthogonalized(matrices: Tensor) -> Tensor:
    """The nearest matrices with singular values of about 1 [..., A, B], by a quintic Newton–Schulz iteration.

    In bfloat16 on a GPU, as usual; elsewhere in the precision of the matrices.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(TINY)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon trains a parameter of `Transformer`: the matrices of blocks, but for routers and gates, whose rows
    are choices and not features."""
    return name.startswith("blocks.") and parameter.ndim >= 2 and not name.endswith(_CHOICES)


_CHOICES = ("router.weight", "shared_gate.weight")

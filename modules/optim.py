"""The optimizer of a network whose parameters may have grown: decay groups and factors for each parameter."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from modules.errors import InputError, require_positive
from modules.grown_adamw import GrownAdamW
from modules.muon import MuonAdamW, is_hidden_matrix
from modules.world import ONE_PROCESS, World


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101), or Muon. Gradient clipping is the trainer's `gradient_clip_val`."""

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw for all parameters; or muon for the matrices of blocks, experts too, and adamw for embeddings, output head,
    routers, gains and biases, at the same learning rate (Moonlight, arXiv 2502.16982)"""
    lr: float = 1e-3
    """peak learning rate"""
    betas: tuple[float, float] = (0.9, 0.95)
    """adamw: decay of the first and second moment"""
    eps: float = 1e-8
    """adamw: added to the root of the second moment"""
    weight_decay: float = 0.1
    """decoupled weight decay of matrices; gains and biases have none"""
    momentum: float = 0.95
    """muon: decay of the momentum"""

    def __post_init__(self) -> None:
        require_positive(lr=float(self.lr), eps=float(self.eps))
        object.__setattr__(self, "betas", tuple(self.betas))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas={self.betas} must be two numbers in [0, 1); the usual ones are (0.9, 0.95)")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise InputError(f"weight_decay={self.weight_decay} must be a finite number of at least 0")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum={self.momentum} must lie in [0, 1); 0.95 is usual")


@dataclass(frozen=True)
class ParameterFactors:
    """What a parameter's learning rate, weight decay and eps are multiplied with after it has grown."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    muon: float = 1.0
    """under Muon, its learning rate once more, and its weight decay divided by it: what the size of a step loses when
    the matrix has more entries"""

    def __mul__(self, other: "ParameterFactors") -> "ParameterFactors":
        return ParameterFactors(
            self.lr * other.lr, self.weight_decay * other.weight_decay, self.eps * other.eps, self.muon * other.muon
        )


def factor_record(factors: Mapping[str, ParameterFactors]) -> dict[str, list[float]]:
    """Factors as JSON types, for checkpoints; `ParameterFactors(*values)` reads one back."""
    return {name: list(astuple(factor)) for name, factor in factors.items()}


def build_optimizer(
    network: nn.Module,
    config: OptimizerConfig,
    factors: Mapping[str, ParameterFactors],
    world: World = ONE_PROCESS,
) -> GrownAdamW:
    """The optimizer, its groups by rule and settings; matrices (two dimensions or more) decay, gains and biases do not.

    The order of groups and of parameters in them is a function of names and factors alone, so that a saved state fits
    the optimizer that a resumed run builds.
    """
    members: dict[tuple[bool, bool, ParameterFactors], list[tuple[str, Tensor]]] = defaultdict(list)
    for name, parameter in network.named_parameters():
        is_muon = config.kind == "muon" and is_hidden_matrix(name, parameter)
        factor = factors.get(name, ParameterFactors())
        factor = factor if is_muon else replace(factor, muon=1.0)
        members[is_muon, parameter.ndim >= 2, factor].append((name, parameter))
    groups: list[dict[str, Any]] = [
        {
            "params": named,
            "lr": config.lr * factor.lr * factor.muon,
            "weight_decay": config.weight_decay * factor.weight_decay / factor.muon if decays else 0.0,
            "eps": config.eps * factor.eps,
            **({"is_muon": is_muon, "momentum": config.momentum} if config.kind == "muon" else {}),
        }
        for (is_muon, decays, factor), named in members.items()
    ]
    optimizer = MuonAdamW if config.kind == "muon" else GrownAdamW
    return optimizer(groups, world, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def build_scheduler(optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> LambdaLR:
    """The schedule as torch's scheduler, one call per optimizer step.

    Args:
        factor: on the learning rate, for the update that follows so many finished ones.
    """
    return LambdaLR(optimizer, factor)


def continue_scheduler(scheduler: LambdaLR, finished_steps: int) -> None:
    """Set a fresh scheduler to where the run stands; the groups of the optimizer may have changed."""
    scheduler.last_epoch = finished_steps
    scheduler._step_count = finished_steps + 1
    rates = [
        base * factor(finished_steps) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def apply_settings(optimizer: torch.optim.Optimizer, scheduler: LambdaLR, wanted: torch.optim.Optimizer) -> None:
    """Give a restored optimizer the settings of one built from the configuration; its state stays.

    Loading a state dict also brings back the settings that it was saved with: without this, new ones would be passed
    over in silence.
    """
    for group, setting in zip(optimizer.param_groups, wanted.param_groups, strict=True):
        group.update({key: setting[key] for key in ("weight_decay", "eps", "betas", "momentum") if key in setting})
        group["initial_lr"] = setting["lr"]
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    continue_scheduler(scheduler, scheduler.last_epoch)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None, world: World = ONE_PROCESS) -> Tensor:
    """Scale gradients so that their global norm is at most `max_norm` (None: leave them); returns the norm before."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = world.gradient_norm(gradients)
    if max_norm:
        factor = (max_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)
        torch._foreach_mul_([world.local(gradient) for gradient in gradients], factor)
    return norm


CLIP_EPSILON = 1e-6
"""Added to the norm, as torch does."""

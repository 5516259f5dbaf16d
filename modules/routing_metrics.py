"""How evenly routers use their experts, as a torchmetrics metric: sums over micro-batches and ranks, figures of them.

Letters: N routed layers, E experts, K experts per token.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor
from torchmetrics import Metric

LOAD_FIGURES = ("load_cv", "max_over_ideal", "dead_fraction")
"""what `load_figures` tells of each layer"""


def load_figures(tokens_per_expert_NE: Tensor) -> dict[str, Tensor]:
    """Figures [N] of the load of each layer's experts (float64), by the names in `LOAD_FIGURES`.

    `load_cv`: coefficient of variation over experts, 0 when even; `max_over_ideal`: the busiest expert's load against
    an even one, 1 when even and E / K at most; `dead_fraction`: share of the experts without a token.
    """
    load_NE = tokens_per_expert_NE.double()
    load_NE = load_NE / load_NE.mean(dim=1, keepdim=True)
    return {
        "load_cv": load_NE.std(dim=1, correction=0),
        "max_over_ideal": load_NE.amax(dim=1),
        "dead_fraction": (tokens_per_expert_NE == 0).double().mean(dim=1),
    }


def language_distance(counts: Sequence[Tensor]) -> float:
    """How differently languages use experts: the total variation distance of their shares, 0 where they use all alike,
    1 where they share none; a mean over layers and pairs of languages.

    Args:
        counts: choices of each expert [N, E], for each language.
    """
    shares = [counts_NE.double() / counts_NE.sum(dim=1, keepdim=True) for counts_NE in counts]
    distances = [(one - other).abs().sum(dim=1).mean() / 2 for one, other in combinations(shares, 2)]
    return torch.stack(distances).mean().item()


class ExpertChoices(Metric):
    """How often each expert of each layer was chosen."""

    full_state_update = False
    tokens_per_expert_NE: Tensor

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__()
        counts = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        self.add_state("tokens_per_expert_NE", default=counts, dist_reduce_fx="sum")

    def update(self, tokens_per_expert_NE: Tensor) -> None:
        """Add one batch's choices."""
        self.tokens_per_expert_NE += tokens_per_expert_NE

    def compute(self) -> Tensor:
        """Choices [N, E] of all that was added, by one process or many."""
        return self.tokens_per_expert_NE


class RoutingLoad(Metric):
    """What the routers of one network did with everything that was added.

    Each state is a sum over updates and, when `compute` runs in several processes, over ranks. Figures are those of the
    sums: the variation of a step's counts, not a mean over its micro-batches. Means are weighted by tokens. `update`
    stays on the device; only reading what `compute` returns waits for it.

    Args:
        num_layers: routed layers (N).
        num_experts: experts of each (E).
        top_k: experts per token (K).
    """

    full_state_update = False
    tokens_per_expert_NE: Tensor
    dropped_NK: Tensor
    entropy_N: Tensor
    logit_squares_N: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    num_tokens: Tensor

    def __init__(self, num_layers: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        counts = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        self.add_state("tokens_per_expert_NE", default=counts, dist_reduce_fx="sum")
        self.add_state("num_tokens", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        shapes = {"dropped_NK": (num_layers, top_k), "entropy_N": (num_layers,), "logit_squares_N": (num_layers,)}
        for name, shape in (shapes | {"balance_loss": (), "z_loss": ()}).items():
            self.add_state(name, default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, watched: Mapping[str, Tensor], num_tokens: int) -> None:
        """Add one micro-batch of one rank.

        Args:
            watched: tensors that a training step returns: `tokens_per_expert_NE` (choices before any is dropped),
                `dropped_NK`, `entropy_N`, `logit_rms_N`, and the scalars `balance_loss` and `z_loss`.
            num_tokens: tokens that were routed in each layer.
        """
        self.tokens_per_expert_NE += watched["tokens_per_expert_NE"]
        self.dropped_NK += num_tokens * watched["dropped_NK"].double()
        self.entropy_N += num_tokens * watched["entropy_N"].double()
        self.logit_squares_N += num_tokens * watched["logit_rms_N"].double().square()
        self.balance_loss += num_tokens * watched["balance_loss"].double()
        self.z_loss += num_tokens * watched["z_loss"].double()
        self.num_tokens += num_tokens

    def compute(self) -> dict[str, Tensor]:
        """Figures of all layers together under a plain name, and of each layer under that name with `_N`.

        `load_cv`, `max_over_ideal` (together: the busiest expert of any layer), `dead_fraction`, `entropy` in nats,
        `logit_rms`, `dropped_first` and (with K > 1) `dropped_second`: the share of these choices that found no slot.
        Only together: `balance_loss`, `z_loss`. Beside them the sums `tokens_per_expert_NE`. torchmetrics hands a
        tensor of one number back without its dimensions.
        """
        choices_KN = (self.dropped_NK / self.num_tokens).T
        dropped = dict(zip(("dropped_first", "dropped_second"), choices_KN, strict=False))
        squares_N = self.logit_squares_N / self.num_tokens
        by_layer = load_figures(self.tokens_per_expert_NE) | {"entropy": self.entropy_N / self.num_tokens} | dropped
        together = {name: value_N.mean() for name, value_N in by_layer.items()}
        together["max_over_ideal"] = by_layer["max_over_ideal"].amax()
        together["logit_rms"], by_layer["logit_rms"] = squares_N.mean().sqrt(), squares_N.sqrt()
        losses = {"balance_loss": self.balance_loss / self.num_tokens, "z_loss": self.z_loss / self.num_tokens}
        counts = {"tokens_per_expert_NE": self.tokens_per_expert_NE}
        return together | losses | counts | {f"{name}_N": value_N for name, value_N in by_layer.items()}

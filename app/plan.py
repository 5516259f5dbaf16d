"""What a run will be, before it starts: its stages, their sizes and costs, and advice on when to grow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from modules.config import ModelConfig
from modules.functional.flops import ParameterCount, count_parameters, training_flops_per_token
from modules.growth.stage import GrowthStage

BYTES_PER_NUMBER = 4
"""Weights, gradients and optimizer state are float32."""
SCRATCH_ADVICE = 2.0
"""From so many times the dense model's cost on, a mixture is better trained from scratch: a rule of thumb."""

EARLY = 0.2
"""Share of a run's FLOPs up to which a growth counts as early: our reading of where the papers grow."""
LAW_FROM = 1e18
"""FLOPs of a run from which G_stack's law is quoted: for small ones it asks for more tokens than they have."""


@dataclass(frozen=True)
class PlannedStage:
    """The run between two transitions.

    Attributes:
        transition: the stage of the recipe that it begins with; None for the first.
        first_step, last_step: optimizer steps; None where only the run can tell.
        tokens: that it trains on; None likewise.
    """

    config: ModelConfig
    transition: GrowthStage | None
    first_step: int | None
    last_step: int | None
    tokens: int | None
    seq_len: int
    is_muon: bool = False

    @property
    def count(self) -> ParameterCount:
        """Parameters."""
        return count_parameters(self.config)

    @property
    def flops_per_token(self) -> float:
        """Forward and backward."""
        return training_flops_per_token(self.config, self.seq_len)

    @property
    def flops(self) -> float | None:
        """Of the whole stage."""
        return None if self.tokens is None else self.tokens * self.flops_per_token

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and optimizer state, which is two moments of each parameter, or one where Muon trains it;
        activations come on top."""
        moments = 2 * self.count.total - (self.count.non_embedding if self.is_muon else 0)
        return (2 * self.count.total + moments) * BYTES_PER_NUMBER


def plan_stages(
    architectures: Sequence[ModelConfig],
    recipe: Sequence[GrowthStage],
    max_steps: int,
    tokens_per_step: int,
    seq_len: int,
    is_muon: bool = False,
) -> list[PlannedStage]:
    """The stages of a run that has been checked: one architecture more than the recipe has stages."""
    due = [stage.due_step(tokens_per_step, max_steps) for stage in recipe]
    begins, ends = [0, *due], [*due, max_steps]
    planned = []
    for config, transition, begin, end in zip(architectures, [None, *recipe], begins, ends, strict=True):
        known = begin is not None and end is not None
        tokens = (end - begin) * tokens_per_step if begin is not None and end is not None else None
        first = begin + 1 if begin is not None else None
        last = end if known or end else None
        planned.append(PlannedStage(config, transition, first, last, tokens, seq_len, is_muon))
    return planned


def advise(stages: Sequence[PlannedStage]) -> list[str]:
    """When to grow and when to train from scratch, for the transitions whose costs are known."""
    lines = []
    for number, (before, after) in enumerate(pairwise(stages), start=1):
        spent = [stage.flops for stage in stages[:number]]
        rest = [stage.flops for stage in stages[number:]]
        if None in spent or None in rest:
            continue
        cost, budget = sum(filter(None, spent)), sum(filter(None, rest))
        if before.config.moe is None and after.config.moe is not None:
            lines.append(_advise_upcycle(number, budget / cost))
        elif after.config.num_layers > before.config.num_layers:
            lines.append(_advise_depth(number, before, after, cost, budget))
    return lines


def growth_tokens(num_parameters: int, flops: float) -> float:
    """Tokens after which to stack a model, by G_stack's law: log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74.

    Args:
        num_parameters: of the grown model, without embeddings (N).
        flops: the whole budget (C).

    Source: arXiv 2405.15319, for stacking by 4.
    """
    return 10 ** (0.88 * math.log10(num_parameters) + 163.27 / math.log10(flops) - 5.74)


def _advise_upcycle(number: int, ratio: float) -> str:
    verdict = "train the mixture from scratch" if ratio >= SCRATCH_ADVICE else "upcycling is the cheaper way"
    return (
        f"transition {number}: the mixture is trained for {ratio:.2g} times what the dense model cost; by a rule of "
        f"thumb upcycling pays below {SCRATCH_ADVICE:.0f}: {verdict}"
    )


def _advise_depth(number: int, before: PlannedStage, after: PlannedStage, cost: float, budget: float) -> str:
    share = cost / (cost + budget)
    method = "stack suits early growth" if share < EARLY else "interpolate suits late growth"
    law = growth_tokens(after.count.non_embedding, cost + budget)
    told = f"; G_stack's law for stacking by 4 says {law:.2g} tokens (arXiv 2405.15319)"
    return (
        f"transition {number}: {share:.0%} of the run's FLOPs come before it; of the methods that change the function, "
        f"{method}{told if cost + budget >= LAW_FROM else ''}"
    )

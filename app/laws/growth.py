"""What printed laws say about growing a model that one has: they know models from scratch alone.

No law at hand tells the loss of a grown model. These tell what the same FLOPs would reach from scratch, and how long it
pays to go on with the model as it is; that is the bar for growth, not a forecast of it.
"""

import math
from dataclasses import dataclass

from app.laws.law import Law, Optimum, falling_root, optimum
from app.plan import LAW_FROM, SCRATCH_ADVICE, growth_tokens
from modules.errors import InputError, require_positive

_STEP = 1e-4
"""of logarithms, for slopes"""
_DECADES = 6
"""How far tokens and budgets are searched, on both sides."""
STACKED = 4
"""times the size, in G_stack's law"""


@dataclass(frozen=True)
class Owned:
    """A dense model that one has, by a law.

    Attributes:
        law: that knows dense models and tokens.
        parameters: N, as the law counts them.
        tokens: D, that it has been trained on.
    """

    law: Law
    parameters: float
    tokens: float

    def __post_init__(self) -> None:
        require_positive(have_parameters=float(self.parameters), have_tokens=float(self.tokens))
        if self.law.dense is None:
            raise InputError(
                f"{self.law.name} knows no dense models of different tokens, and have_parameters="
                f"{self.parameters:g} is one; set law=chinchilla or law=joint"
            )

    def loss(self, tokens: float) -> float:
        """After so many tokens in all."""
        assert self.law.dense is not None
        return self.law.loss(self.parameters, tokens, **self.law.dense)

    def continued(self, flops: float) -> Optimum:
        """The same model after a further budget."""
        tokens = self.tokens + flops / self._flops_per_token
        return Optimum(self.parameters, tokens, self.loss(tokens))

    @property
    def spent(self) -> float:
        """FLOPs of its training so far."""
        return self.tokens * self._flops_per_token

    @property
    def gain_of_doubling(self) -> float:
        """Nats that as many tokens again would take off."""
        return self.loss(self.tokens) - self.loss(2 * self.tokens)

    def balanced_tokens(self) -> float:
        """Tokens, in all, up to which one percent more of them takes off more loss than one percent more parameters.

        There the size is compute-optimal for what it costs; later a FLOP does more in a larger model.
        """
        assert self.law.dense is not None
        dense = self.law.dense

        def slope_by_tokens_over_size(tokens: float) -> float:
            by_tokens = self.loss(tokens * math.exp(-_STEP)) - self.loss(tokens * math.exp(_STEP))
            sizes = (self.parameters * math.exp(sign * _STEP) for sign in (-1, 1))
            smaller, larger = (self.law.loss(size, tokens, **dense) for size in sizes)
            return by_tokens - (smaller - larger)

        return falling_root(slope_by_tokens_over_size, self.parameters / 10**_DECADES, self.parameters * 10**_DECADES)

    def break_even(self) -> float | None:
        """Further FLOPs from which on a new dense model, trained from scratch on them alone, beats going on; None where
        no budget in reach is so large.

        What has been spent is sunk: it counts for the model at hand, and not against it.
        """
        assert self.law.dense is not None
        dense = self.law.dense

        def lead(flops: float) -> float:
            return optimum(self.law, flops, **dense).loss - self.continued(flops).loss

        budgets = [self.spent * 10**power for power in range(_DECADES, -_DECADES - 1, -1)]
        leading = next((index for index, flops in enumerate(budgets) if lead(flops) > 0), len(budgets))
        if leading in (0, len(budgets)):
            return None if leading == 0 else 0.0
        return falling_root(lead, budgets[leading], budgets[leading - 1])

    @property
    def _flops_per_token(self) -> float:
        assert self.law.dense is not None
        return self.law.flops_per_token(self.parameters, **self.law.dense)


def growth_notes(owned: Owned, flops: float) -> list[str]:
    """What to do with a dense model and a further budget: by the law first, then by rules of thumb, named as such."""
    balanced, even = owned.balanced_tokens(), owned.break_even()
    more = balanced - owned.tokens
    worth = f"{_count(more)} more are worth it" if more > 0 else f"it is past that by {_count(-more)}"
    until = "in every budget in reach" if even is None else f"for less than {even:.2g} further FLOPs"
    notes = [
        f"by the law's slopes: percent for percent, tokens do more than parameters up to {_count(balanced)} of them; "
        f"{worth}",
        f"by the law: as many tokens again take off {owned.gain_of_doubling:.3f} nats",
        f"by the law: going on beats a new dense model from scratch {until}; what has been spent is not counted",
        "no law here tells the loss of a grown model: the models from scratch are the bar that it has to pass",
    ]
    ratio = flops / owned.spent
    verdict = "the mixture from scratch" if ratio >= SCRATCH_ADVICE else "upcycling"
    notes.append(
        f"rule of thumb: upcycling pays below {SCRATCH_ADVICE:.0f} times what the dense model has cost; the budget is "
        f"{ratio:.2g} times that: {verdict}"
    )
    return notes + _stacking_notes(owned, owned.spent + flops)


def _stacking_notes(owned: Owned, whole: float) -> list[str]:
    """G_stack's growth point for the model at hand, of a whole budget."""
    if whole < LAW_FROM:
        return [f"G_stack's law of growth points is not for budgets below {LAW_FROM:g} FLOPs"]
    due = growth_tokens(round(STACKED * owned.parameters), whole)
    told = f"the model has {_count(owned.tokens)}"
    if owned.spent * due / owned.tokens > whole:
        told = "more than the whole budget pays: too small a budget for that size"
    return [
        f"rule of thumb: G_stack's law (arXiv 2405.15319, parameters without embeddings) stacks by {STACKED} to "
        f"{_count(STACKED * owned.parameters)} after {_count(due)} tokens; {told}"
    ]


def _count(number: float) -> str:
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"

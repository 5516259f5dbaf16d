"""What a scaling law is here: a loss from sizes, what training costs by it, where it was fitted, and who printed it.

N parameters, D training tokens, C training FLOPs, E experts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from modules.errors import InputError, require_not_negative

FLOPS_PER_PARAMETER = 6.0
"""of training, for each token: C = 6 N D"""
FORWARD_SHARE = 1 / 3
"""of the FLOPs of a training token, which an inference token costs: 2 of 6"""
_REACH = 9.0
"""Sizes that are searched: so far from 20 tokens for each parameter, in natural logarithms."""
_LEAST = 1e-9
"""Parameters: below any model."""


@dataclass(frozen=True)
class Domain:
    """Where a law was fitted: least and largest values by name. Outside it is a guess."""

    ranges: Mapping[str, tuple[float, float]]

    def warnings(self, **values: float) -> list[str]:
        """What lies outside, in words."""
        found = []
        for name, value in values.items():
            low, high = self.ranges.get(name, (0.0, math.inf))
            if not low <= value <= high:
                side = f"up to {high:.3g}" if value > high else f"from {low:.3g} on"
                found.append(f"{name}={value:.3g} is outside of what the law was fitted on ({side})")
        return found


@dataclass(frozen=True)
class Knob:
    """What a law knows besides N and D.

    Attributes:
        name: the keyword of the law's functions, and the option of the command line.
        values: for which a plan is printed.
        dense: the value of a dense model; None where the law has none.
        least, below: the values that mean something.
        bounds: between which the best value may be any number; None where only `values` are tried.
    """

    name: str
    values: tuple[float, ...]
    dense: float | None
    least: float = 1.0
    below: float = math.inf
    bounds: tuple[float, float] | None = None

    def check(self, values: list[float]) -> list[float]:
        """The values, if all of them mean something.

        Raises:
            InputError: none of them, or one that means nothing.
        """
        if not values:
            raise InputError(f"{self.name}=[] holds no value; give at least one, such as [{self.values[-1]:g}]")
        wrong = next((value for value in values if not self.least <= value < self.below), None)
        if wrong is not None:
            limit = f"at least {self.least:g}" + (f" and below {self.below:g}" if math.isfinite(self.below) else "")
            meaning = f"; {self.dense:g} is a dense model" if self.dense is not None else "; give another value"
            raise InputError(f"{self.name}={wrong:g} must be {limit}{meaning}")
        return values


def six_per_parameter(parameters: float, **settings: Any) -> float:
    """Training FLOPs of a token where N are the parameters that compute: 6 N."""
    return FLOPS_PER_PARAMETER * parameters


@dataclass(frozen=True)
class Law:
    """A printed scaling law.

    Attributes:
        name: for people.
        source: who printed the constants, and where.
        loss: nats per token for N parameters and D tokens, with what else the law knows by keyword. Losses of different
            laws are of different data, and cannot be compared.
        counts: which parameters N are.
        domain: where it was fitted.
        flops_per_token: of training, for N parameters and what else the law knows by keyword.
        knob: what else it knows; None for nothing.
        fixed_tokens: of all of its runs; None where D varies.
        sizes: what else to print, by name, from N and the knob's value.
        remarks: what anybody who reads a plan by this law has to know.
    """

    name: str
    source: str
    counts: str
    loss: Callable[..., float]
    domain: Domain = field(default_factory=lambda: Domain({}))
    flops_per_token: Callable[..., float] = six_per_parameter
    knob: Knob | None = None
    fixed_tokens: float | None = None
    sizes: Mapping[str, Callable[[float, float], float]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def dense(self) -> dict[str, float] | None:
        """Keywords that mean a dense model; None where the law has none, or knows no tokens."""
        if self.fixed_tokens is not None or (self.knob is not None and self.knob.dense is None):
            return None
        return {} if self.knob is None or self.knob.dense is None else {self.knob.name: self.knob.dense}


@dataclass(frozen=True)
class Optimum:
    """The best model for a budget.

    Attributes:
        parameters: N, as the law counts them.
        tokens: D.
        loss: of the law's data, in nats per token.
    """

    parameters: float
    tokens: float
    loss: float

    @property
    def tokens_per_parameter(self) -> float:
        """D / N."""
        return self.tokens / self.parameters


def at_size(law: Law, flops: float, parameters: float, inference_tokens: float = 0.0, **settings: Any) -> Optimum:
    """What a budget buys with a given number of parameters: C = F(N) (D + D_inf / 3), F the FLOPs of a token.

    Raises:
        InputError: a budget that is not above 0, or that leaves no token to train on.
    """
    _require_budget(flops)
    each = law.flops_per_token(parameters, **settings)
    tokens = flops / each - FORWARD_SHARE * inference_tokens
    if not tokens > 0:
        raise InputError(
            f"parameters={parameters:.3g} cost {each * FORWARD_SHARE * inference_tokens:.3g} FLOPs of inference, and "
            f"flops={flops:.3g} leave none to train; give more FLOPs or fewer parameters"
        )
    return Optimum(parameters, tokens, law.loss(parameters, tokens, **settings))


def optimum(
    law: Law, flops: float, *, largest: float = math.inf, inference_tokens: float = 0.0, **settings: Any
) -> Optimum:
    """The least loss that a budget can buy. By a law with fixed tokens, the size that the budget pays for them.

    Args:
        law: by which.
        flops: of training (C = 6 N D, or the law's own count), and of inference where there is some.
        largest: parameters, where memory limits them.
        inference_tokens: of the model's whole life, each a third of a training token.
        settings: the value of the law's knob.

    Raises:
        InputError: a budget that is not above 0, or that has no room for the tokens.
    """
    from scipy.optimize import minimize_scalar

    _require_budget(flops)
    require_not_negative(inference_tokens=inference_tokens)
    if law.fixed_tokens is not None:
        seen = law.fixed_tokens + FORWARD_SHARE * inference_tokens
        parameters = falling_root(lambda n: flops - law.flops_per_token(n, **settings) * seen, _LEAST, flops)
        return Optimum(parameters, law.fixed_tokens, law.loss(parameters, law.fixed_tokens, **settings))
    high = 0.5 * math.log(flops / 120) + _REACH  # 120: 6 FLOPs, 20 tokens for each parameter
    room = flops / (1 + FORWARD_SHARE * inference_tokens)
    if law.flops_per_token(_LEAST, **settings) > room:
        raise InputError(
            f"inference_tokens={inference_tokens:.3g} cost more than flops={flops:.3g} at any size; give more FLOPs, "
            "or fewer tokens"
        )
    if law.flops_per_token(math.exp(high), **settings) > room:
        high = math.log(falling_root(lambda n: room - law.flops_per_token(n, **settings), _LEAST, math.exp(high)))
    high = min(high, math.log(largest))

    def loss_at(log_n: float) -> float:
        return at_size(law, flops, math.exp(log_n), inference_tokens, **settings).loss

    found = minimize_scalar(loss_at, bounds=(high - 2 * _REACH, high), method="bounded", options={"xatol": 1e-10})
    return at_size(law, flops, math.exp(found.x), inference_tokens, **settings)


def best_setting(law: Law, flops: float, parameters: float | None = None, **options: Any) -> tuple[float, Optimum]:
    """The knob's value of least loss, at a given size or at the best one, and what it buys."""
    from scipy.optimize import minimize_scalar

    knob = law.knob
    assert knob is not None

    def at(value: float) -> Optimum:
        settings = {**options, knob.name: value}
        return optimum(law, flops, **settings) if parameters is None else at_size(law, flops, parameters, **settings)

    candidates = list(knob.values)
    if knob.bounds is not None:
        inside = minimize_scalar(
            lambda value: at(value).loss, bounds=knob.bounds, method="bounded", options={"xatol": 1e-8}
        )
        candidates += [*knob.bounds, float(inside.x)]
    found = [(value, at(value)) for value in candidates]
    return min(found, key=lambda pair: pair[1].loss)


def falling_root(positive_below: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that is positive at `low` and falls becomes zero, on a logarithmic scale.

    Raises:
        InputError: a function that is not positive at `low`.
    """
    if positive_below(low) < 0:
        raise InputError(f"no size between {low:.3g} and {high:.3g} parameters fits; give a larger budget")
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if positive_below(middle) > 0 else (low, middle)
    return low


def _require_budget(flops: float) -> None:
    if not (flops > 0 and math.isfinite(flops)):
        raise InputError(f"flops={flops:g} is no budget; give training FLOPs above 0, such as 1e21")

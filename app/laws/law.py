"""What a scaling law is here: a loss from sizes, where it was fitted, and who printed it.

N parameters, D training tokens, C training FLOPs, E experts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from modules.errors import InputError

FLOPS_PER_PARAMETER = 6.0
"""of training, for each token: C = 6 N D"""


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
class Law:
    """A printed scaling law.

    Attributes:
        name: for people.
        source: who printed the constants, and where.
        loss: nats per token for N parameters and D tokens, with what else the law knows by keyword. Losses of different
            laws are of different data, and cannot be compared.
        counts: which parameters N are.
        domain: where it was fitted.
    """

    name: str
    source: str
    counts: str
    loss: Callable[..., float]
    domain: Domain = field(default_factory=lambda: Domain({}))


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


def optimum(law: Law, flops: float, **settings: Any) -> Optimum:
    """The least loss that training FLOPs C = 6 N D can buy.

    Raises:
        InputError: a budget that is not above 0.
    """
    from scipy.optimize import minimize_scalar

    if not (flops > 0 and math.isfinite(flops)):
        raise InputError(f"flops={flops:g} is no budget; give training FLOPs above 0, such as 1e21")
    centre = 0.5 * math.log(flops / 120)  # of 20 tokens for each parameter

    def loss_at(log_n: float) -> float:
        return law.loss(math.exp(log_n), flops / (FLOPS_PER_PARAMETER * math.exp(log_n)), **settings)

    found = minimize_scalar(loss_at, bounds=(centre - 9, centre + 9), method="bounded", options={"xatol": 1e-10})
    parameters = math.exp(found.x)
    return Optimum(parameters, flops / (FLOPS_PER_PARAMETER * parameters), float(found.fun))

"""The Joint law under limits: memory for all parameters, keys and values, and compute that inference shares.

Ludziejewski et al. 2025, arXiv 2502.05172: N_total = 2 d V + (4 + 9 E) n d², N_active = 2 d V + 13 n d², keys and
values 2 T n d, and 6 N D + 2 N D_inf = F for a model's whole life. V words, n layers of width d, E experts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from app.laws.law import Law, Optimum, falling_root, optimum
from modules.errors import InputError, require_not_negative, require_positive

LEAST_BYTES = 1e6
"""Less memory than this is taken for a number in another unit."""


@dataclass(frozen=True)
class Limits:
    """What a model has to fit in and to serve, and the shape by which its sizes are told.

    Attributes:
        memory_bytes: that weights, keys and values may take; without limit when left out.
        kv_tokens: whose keys and values are in memory at once; every head has its own.
        inference_tokens: of the model's whole life, whose FLOPs the budget pays, too.
        bytes_per_parameter: of a weight, and of a number in keys and values.
        width_per_layer: d / n, an assumption of ours.
        vocab_size: words, with an input and an output embedding each.
    """

    memory_bytes: float | None = None
    kv_tokens: float = 0.0
    inference_tokens: float = 0.0
    bytes_per_parameter: float = 2.0
    width_per_layer: float = 64.0
    vocab_size: int = 50257

    def __post_init__(self) -> None:
        positive = {name: getattr(self, name) for name in ("bytes_per_parameter", "width_per_layer", "vocab_size")}
        if self.memory_bytes is not None:
            positive["memory_bytes"] = self.memory_bytes
        require_positive(**{f"limits.{name}": value for name, value in positive.items()})
        if self.memory_bytes is not None and self.memory_bytes < LEAST_BYTES:
            raise InputError(
                f"limits.memory_bytes={self.memory_bytes:g} is below {LEAST_BYTES:g}, too little for any model; give "
                "bytes, such as 80e9"
            )
        free = {"kv_tokens": self.kv_tokens, "inference_tokens": self.inference_tokens}
        require_not_negative(**{f"limits.{name}": value for name, value in free.items()})

    def width(self, parameters: float) -> float:
        """Of the shape with so many active parameters: the real root of 13 d³ / (d/n) + 2 V d = N_active."""
        slope = 2 * self.vocab_size * self.width_per_layer / 13
        right = parameters * self.width_per_layer / 13
        return 2 * math.sqrt(slope / 3) * math.sinh(math.asinh(1.5 * right / slope * math.sqrt(3 / slope)) / 3)

    def all_parameters(self, parameters: float, experts: float) -> float:
        """Of active ones: N_active + 9 (E - 1) n d²."""
        return parameters + 9 * (experts - 1) * self.width(parameters) ** 3 / self.width_per_layer

    def used_bytes(self, parameters: float, experts: float) -> float:
        """Of weights, keys and values."""
        kept = 2 * self.kv_tokens * self.width(parameters) ** 2 / self.width_per_layer
        return self.bytes_per_parameter * (self.all_parameters(parameters, experts) + kept)

    def largest(self, experts: float) -> float:
        """Active parameters that just fit in the memory."""
        limit = self.memory_bytes
        if limit is None:
            return math.inf
        return falling_root(
            lambda n: limit - self.used_bytes(n, experts), 1e-6 * limit, 2 * limit / self.bytes_per_parameter
        )

    def learning_rate(self, parameters: float, experts: float) -> float:
        """The paper's, at its batch sizes: exp(8.39 - 0.81 ln N - 0.25 ln E), N active without embeddings."""
        inside = 13 * self.width(parameters) ** 3 / self.width_per_layer
        return math.exp(8.39 - 0.81 * math.log(inside) - 0.25 * math.log(experts))

    @property
    def sizes(self) -> Mapping[str, Callable[[float, float], float]]:
        """What to print of a model, by name, from active parameters and experts."""
        return {
            "all parameters": self.all_parameters,
            "memory, GB": lambda parameters, experts: self.used_bytes(parameters, experts) / 1e9,
            "learning rate": self.learning_rate,
        }


def within(law: Law, flops: float, experts: float, limits: Limits) -> Optimum:
    """The best model of so many experts for a budget within limits.

    Raises:
        InputError: memory that no model fits in; a budget with no room for the tokens.
    """
    try:
        largest = limits.largest(experts)
    except InputError:
        raise InputError(
            f"limits.memory_bytes={limits.memory_bytes:g} holds no model of {experts:g} experts; give more memory, or "
            "fewer limits.kv_tokens"
        ) from None
    return optimum(law, flops, largest=largest, inference_tokens=limits.inference_tokens, experts=experts)

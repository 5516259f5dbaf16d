"""What serving a mixture costs, and which mixture serves best (Yun et al. 2024, arXiv 2404.02852, algorithms 1 and 2).

The paper profiles its machines; here a roofline stands in for them: a decoding step takes as long as the slower of two,
reading the weights that its batch touches with all keys and values, or its products. Letters: N active parameters,
E experts, K of them for each token.
"""

import math
from dataclasses import dataclass

from app.laws.law import Law, Optimum, at_size, falling_root, optimum
from modules.errors import require_positive

FEED_FORWARD_SHARE = 9 / 13
"""of a layer's weights, with a feed-forward of width 3 D in SwiGLU: 9 D² of 13 D² (the Joint law's shape)"""


@dataclass(frozen=True)
class Serving:
    """A machine and its requests.

    Attributes:
        memory_bytes: of one device.
        bandwidth: bytes per second that a device reads of its memory.
        peak_flops: of a device.
        mfu: share of it that products reach.
        bytes_per_parameter: of a weight, and of a number in keys and values.
        prompt, output: mean tokens of a request.
        kv_share: keys and values of a token, in numbers, over N^(2/3): 0.065 where every head has its own, in the shape
            of the study.
    """

    memory_bytes: float = 80e9
    bandwidth: float = 3.35e12
    peak_flops: float = 989e12
    mfu: float = 0.4
    bytes_per_parameter: float = 2.0
    prompt: float = 160.0
    output: float = 210.0
    kv_share: float = 0.065

    def __post_init__(self) -> None:
        names = (
            "memory_bytes",
            "bandwidth",
            "peak_flops",
            "mfu",
            "bytes_per_parameter",
            "prompt",
            "output",
            "kv_share",
        )
        require_positive(**{f"serving.{name}": float(getattr(self, name)) for name in names})

    def cost(self, parameters: float, experts: float, top_k: int = 1) -> float:
        """Device-seconds of one million output tokens, on the number of devices that makes it least.

        Args:
            parameters: active ones.
            experts: of each layer; 1 is a dense model.
            top_k: experts of each token.
        """
        total = total_parameters(parameters, experts, top_k)
        least = math.ceil(total * self.bytes_per_parameter / self.memory_bytes * 1.0001)
        return min(self._cost_on(devices, parameters, total, experts, top_k) for devices in range(least, 4 * least + 8))

    def _cost_on(self, devices: int, parameters: float, total: float, experts: float, top_k: int) -> float:
        """Of one million output tokens, at the largest batch whose keys and values fit."""
        kv_bytes = self.kv_share * parameters ** (2 / 3) * self.bytes_per_parameter
        room = devices * self.memory_bytes - total * self.bytes_per_parameter
        batch = room / ((self.prompt + self.output) * kv_bytes)
        if batch < 1:
            return math.inf
        missed = (1 - min(1.0, top_k / experts)) ** batch
        always = parameters * (1 - FEED_FORWARD_SHARE)
        touched = always + (total - always) * (1 - missed)
        read = touched * self.bytes_per_parameter + batch * (self.prompt + self.output / 2) * kv_bytes
        products = 2 * parameters * batch
        step = max(read / self.bandwidth, products / (self.peak_flops * self.mfu)) / devices
        prompts = 2 * parameters * self.prompt * batch / self.output / (self.peak_flops * self.mfu * devices)
        return devices * (step + prompts) / batch * 1e6


def total_parameters(parameters: float, experts: float, top_k: int = 1) -> float:
    """All parameters, of the active ones: experts of every layer share 9/13 of them; embeddings are left out."""
    return parameters * (1 + (experts / top_k - 1) * FEED_FORWARD_SHARE)


@dataclass(frozen=True)
class Choice:
    """A number of experts, at some size.

    Attributes:
        experts: of each layer.
        best: what the training budget buys at least loss.
        chosen: the model that is smaller, and trained for longer.
        cost: device-seconds of a million output tokens of the chosen one.
    """

    experts: float
    best: Optimum
    chosen: Optimum
    cost: float

    @property
    def size_share(self) -> float:
        """Of the loss-optimal size."""
        return self.chosen.parameters / self.best.parameters


def cheapest_at_loss(
    law: Law, flops: float, experts: float, loss: float, serving: Serving, top_k: int = 1
) -> Choice | None:
    """Algorithm 1: the smallest model of so many experts that reaches a loss within a training budget; None where
    there is none."""
    best = optimum(law, flops, experts=experts)
    if best.loss > loss:
        return None
    size = falling_root(
        lambda n: at_size(law, flops, n, experts=experts).loss - loss, best.parameters * 1e-4, best.parameters
    )
    return Choice(experts, best, at_size(law, flops, size, experts=experts), serving.cost(size, experts, top_k))


def best_at_cost(
    law: Law, flops: float, experts: float, cost: float, serving: Serving, top_k: int = 1
) -> Choice | None:
    """Algorithm 2: the model of least loss, of so many experts, that costs no more to serve; None where there is
    none."""
    best = optimum(law, flops, experts=experts)
    if serving.cost(best.parameters, experts, top_k) <= cost:
        return Choice(experts, best, best, serving.cost(best.parameters, experts, top_k))
    least = best.parameters * 1e-4
    if serving.cost(least, experts, top_k) > cost:
        return None
    size = falling_root(lambda n: cost - serving.cost(n, experts, top_k), least, best.parameters)
    return Choice(experts, best, at_size(law, flops, size, experts=experts), serving.cost(size, experts, top_k))

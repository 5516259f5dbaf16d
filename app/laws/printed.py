"""Laws with printed constants. Natural logarithms and nats throughout; each law counts parameters in its own way."""

import math
from typing import Any

from app.laws.law import Domain, Law


def saturated(experts: Any, start: float, most: float) -> Any:
    """The number of experts that counts (Clark et al.), of a number or a tensor: `start` for one, at most `most`.

    1/Ê = 1/(E - 1 + (1/start - 1/most)^-1) + 1/most.
    """
    return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)


def _chinchilla(floor: float, a: float, b: float, alpha: float, beta: float, name: str, source: str) -> Law:
    def loss(parameters: float, tokens: float) -> float:
        return floor + a * parameters**-alpha + b * tokens**-beta

    domain = Domain({"parameters": (7e7, 1.6e10), "tokens": (5e9, 5e11)})
    return Law(name, source, "all parameters", loss, domain)


CHINCHILLA = _chinchilla(
    1.8172, 482.01, 2085.43, 0.3478, 0.3658,
    "Chinchilla, refitted", "Besiroglu et al. 2024, arXiv 2404.10102",
)  # fmt: skip
"""The dense default: its optimum agrees with the paper's rule of about 20 tokens for each parameter."""
HOFFMANN = _chinchilla(
    1.69, 406.4, 410.7, 0.34, 0.28,
    "Chinchilla, as printed", "Hoffmann et al. 2022, arXiv 2203.15556, equation 10 (rounded: contradicts its own rule)",
)  # fmt: skip


def _joint_loss(parameters: float, tokens: float, experts: float = 1.0) -> float:
    counted = saturated(experts, 2.0732, 290.4521)
    log_e = math.log(counted)
    by_size = 35.91 * counted**-0.2285 * parameters ** (-0.1889 + 0.0098 * log_e)
    by_data = 35.98 * counted**0.5529 * tokens ** (-0.1775 - 0.0259 * log_e)
    return by_size + by_data + 1.3637


JOINT = Law(
    "Joint MoE law",
    "Ludziejewski et al. 2025, arXiv 2502.05172 (Switch top-1, every layer, FineWeb-Edu)",
    "active parameters, embeddings included",
    _joint_loss,
    Domain({"parameters": (1e8, 2.7e9), "experts": (1, 32), "tokens": (1e9, 1e12)}),
)
"""The default for mixtures: constants are printed, and dense models are part of it."""


def _fine_grained_loss(parameters: float, tokens: float, granularity: float = 1.0) -> float:
    return 0.47 + (2.1 / granularity**0.58 + 18.1) * parameters**-0.115 + 30.8 * tokens**-0.147


FINE_GRAINED = Law(
    "Fine-grained MoE law",
    "Krajewski, Ludziejewski et al. 2024, arXiv 2402.07871 (expansion 64, C4)",
    "all parameters without embeddings",
    _fine_grained_loss,
    Domain({"parameters": (1.2e8, 3.7e9), "granularity": (1, 16), "tokens": (8e9, 1.3e11)}),
)
FINE_GRAINED_EXPANSION = 64


def fine_grained_sizes(dense_equivalent: float) -> tuple[float, float]:
    """Layers (as a real number) and all parameters of the paper's shape d = 64 n, for 12 d² n dense parameters."""
    layers = (dense_equivalent / (12 * 64**2)) ** (1 / 3)
    return layers, (64 * layers) ** 2 * (8 * FINE_GRAINED_EXPANSION + 4) * layers


def fine_grained_flops(dense_equivalent: float, tokens: float, granularity: float) -> float:
    """Training FLOPs with the router's: (12 d² c_f + d E G c_r) D n, with c_f = 6 and c_r = 14."""
    layers, _ = fine_grained_sizes(dense_equivalent)
    width = 64 * layers
    per_token = 12 * width**2 * 6 + width * FINE_GRAINED_EXPANSION * granularity * 14
    return per_token * tokens * layers


CLARK_CONSTANTS = {
    "S-BASE": (-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
    "RL-R": (-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
    "HASH": (-0.087, -0.136, 0.012, 1.157, 4.175, 477.741),
}
"""By router: a, b, c, d, E_start, E_max of log10 L = a log10 N + b log10 Ê + c log10 N log10 Ê + d."""


def _clark_loss(parameters: float, tokens: float = 130e9, experts: float = 1.0, router: str = "S-BASE") -> float:
    a, b, c, d, start, most = CLARK_CONSTANTS[router]
    x, y = math.log10(parameters), math.log10(saturated(experts, start, most))
    return 10 ** (a * x + b * y + c * x * y + d)


CLARK = Law(
    "Law of routed models",
    "Clark et al. 2022, arXiv 2202.01169, table 3 (130B tokens whatever the size)",
    "parameters of the dense base model",
    _clark_loss,
    Domain({"parameters": (1.5e7, 1.3e9), "experts": (1, 512), "tokens": (1.3e11, 1.3e11)}),
)


def clark_effective_parameters(parameters: float, experts: float, router: str = "S-BASE") -> float:
    """The dense model that is as good as a routed one."""
    a, b, c, _, start, most = CLARK_CONSTANTS[router]
    x, y, y_start = math.log10(parameters), math.log10(saturated(experts, start, most)), math.log10(start)
    return 10 ** ((a * x + b * (y - y_start) + c * x * y) / (a + c * y_start))


def _abnar_loss(parameters: float, tokens: float, sparsity: float = 0.0) -> float:
    dense = 1 - sparsity
    by_both = 17.26 * dense**-0.1603 * parameters**-0.1595
    return 16612.50 * parameters**-0.5962 + 5455.67 * tokens**-0.3954 + 0.4598 * dense**0.1666 + by_both + 0.94


ABNAR = Law(
    "Optimal sparsity law",
    "Abnar et al. 2025, arXiv 2501.12370 (held-out R² of 68 % only at sparsity 0.98)",
    "all parameters",
    _abnar_loss,
    Domain({"sparsity": (0.0, 0.98), "parameters": (1e8, 5e10)}),
)

LAWS = {"chinchilla": CHINCHILLA, "hoffmann": HOFFMANN, "joint": JOINT}
"""Laws whose N are the parameters that compute: C = 6 N D."""

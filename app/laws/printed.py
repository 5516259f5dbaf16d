"""Laws with printed constants. Natural logarithms and nats throughout; each law counts parameters in its own way."""

import math
from typing import Any

from app.laws.law import FLOPS_PER_PARAMETER, Domain, Knob, Law


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
    Domain({"parameters": (1e8, 2.7e9), "experts": (1, 32), "tokens": (1e9, 1e12), "all parameters": (1e8, 5e9)}),
    knob=Knob("experts", (1, 2, 4, 8, 16, 32), dense=1),
)
"""The default for mixtures: constants are printed, and dense models are part of it."""


def _fine_grained_loss(parameters: float, tokens: float, granularity: float = 1.0) -> float:
    return 0.47 + (2.1 / granularity**0.58 + 18.1) * parameters**-0.115 + 30.8 * tokens**-0.147


def fine_grained_sizes(dense_equivalent: float) -> tuple[float, float]:
    """Layers (as a real number) and all parameters of the paper's shape d = 64 n, for 12 d² n dense parameters."""
    layers = (dense_equivalent / (12 * 64**2)) ** (1 / 3)
    return layers, (64 * layers) ** 2 * (8 * FINE_GRAINED_EXPANSION + 4) * layers


def fine_grained_equivalent(parameters: float, granularity: float = 1.0) -> float:
    """Parameters of the dense model of the same shape, X: all parameters are 43 X, whatever the granularity."""
    return parameters * 12 / (8 * FINE_GRAINED_EXPANSION + 4)


def fine_grained_flops(dense_equivalent: float, tokens: float, granularity: float) -> float:
    """Training FLOPs with the router's: (12 d² c_f + d E G c_r) D n, with c_f = 6 and c_r = 14."""
    layers, _ = fine_grained_sizes(dense_equivalent)
    width = 64 * layers
    per_token = 12 * width**2 * 6 + width * FINE_GRAINED_EXPANSION * granularity * 14
    return per_token * tokens * layers


def _fine_grained_flops_per_token(parameters: float, granularity: float = 1.0) -> float:
    return fine_grained_flops(fine_grained_equivalent(parameters), 1.0, granularity)


FINE_GRAINED_EXPANSION = 64
FINE_GRAINED = Law(
    "Fine-grained MoE law",
    "Krajewski, Ludziejewski et al. 2024, arXiv 2402.07871 (expansion 64, C4)",
    "all parameters without embeddings",
    _fine_grained_loss,
    Domain({"parameters": (1.2e8, 3.7e9), "granularity": (1, 16), "tokens": (8e9, 1.3e11)}),
    _fine_grained_flops_per_token,
    Knob("granularity", (1, 2, 4, 8, 16, 32, 64), dense=None),
    sizes={"dense equivalent": fine_grained_equivalent},
    remarks=("FLOPs are the law's own, with the router's: they, not the loss, end the growth of the granularity",),
)


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


def clark_effective_parameters(parameters: float, experts: float, router: str = "S-BASE") -> float:
    """The dense model that is as good as a routed one."""
    a, b, c, _, start, most = CLARK_CONSTANTS[router]
    x, y, y_start = math.log10(parameters), math.log10(saturated(experts, start, most)), math.log10(start)
    return 10 ** ((a * x + b * (y - y_start) + c * x * y) / (a + c * y_start))


CLARK = Law(
    "Law of routed models",
    "Clark et al. 2022, arXiv 2202.01169, table 3 (S-BASE)",
    "parameters of the dense base model",
    _clark_loss,
    Domain({"parameters": (1.5e7, 1.3e9), "experts": (1, 512)}),
    knob=Knob("experts", (1, 8, 32, 128, 512), dense=1),
    fixed_tokens=130e9,
    sizes={"as good as dense": clark_effective_parameters},
    remarks=("the law knows no tokens: all of its models saw 130B, so that a budget only sets the base's size",),
)


def _abnar_loss(parameters: float, tokens: float, sparsity: float = 0.0) -> float:
    dense = 1 - sparsity
    by_both = 17.26 * dense**-0.1603 * parameters**-0.1595
    return 16612.50 * parameters**-0.5962 + 5455.67 * tokens**-0.3954 + 0.4598 * dense**0.1666 + by_both + 0.94


def abnar_active(parameters: float, sparsity: float = 0.0) -> float:
    """Active parameters, taken as (1 - S) N: sparsity is the share of experts that rest, as if all were experts.

    An assumption, the simplest one: attention and embeddings, which never rest, are left out, so that a real model
    computes more than it says.
    """
    return parameters * (1 - sparsity)


def _abnar_flops_per_token(parameters: float, sparsity: float = 0.0) -> float:
    return FLOPS_PER_PARAMETER * abnar_active(parameters, sparsity)


ABNAR = Law(
    "Optimal sparsity law",
    "Abnar et al. 2025, arXiv 2501.12370",
    "all parameters",
    _abnar_loss,
    Domain({"sparsity": (0.0, 0.98), "parameters": (1e8, 5e10)}),
    _abnar_flops_per_token,
    Knob("sparsity", (0.0, 0.5, 0.75, 0.9, 0.95, 0.98), dense=0.0, least=0.0, below=1.0, bounds=(0.0, 0.98)),
    sizes={"active": abnar_active},
    remarks=(
        "active parameters are taken as (1 - sparsity) of all, FLOPs as 6 for each of them and token",
        "at sparsity 0.98 the law explains no more than 68 % (R²) of the losses that it was not fitted to",
    ),
)

_SPARSE = {"a_s": 16.8, "b_s": 0.722, "c_s": 45.0, "b_n": 0.245, "a_d": 6.90e8, "b_d": 0.203, "c": 0.651}


def _sparse_size_factor(sparsity: float) -> float:
    return _SPARSE["a_s"] * (1 - sparsity) ** _SPARSE["b_s"] + _SPARSE["c_s"]


def _sparse_loss(parameters: float, tokens: float, sparsity: float = 0.0) -> float:
    by_size = _sparse_size_factor(sparsity) * parameters ** -_SPARSE["b_n"]
    return by_size + (_SPARSE["a_d"] / tokens) ** _SPARSE["b_d"] + _SPARSE["c"]


def sparse_equivalent(parameters: float, sparsity: float) -> float:
    """The dense model that is as good as a sparse one with so many weights that are not zero, at the same tokens."""
    return parameters * (_sparse_size_factor(0.0) / _sparse_size_factor(sparsity)) ** (1 / _SPARSE["b_n"])


def _with_zeros(parameters: float, sparsity: float) -> float:
    return parameters / (1 - sparsity)


SPARSE = Law(
    "Weight-sparsity law",
    "Frantar et al. 2023, arXiv 2309.08520 (T5 on C4)",
    "weights that are not zero",
    _sparse_loss,
    Domain({"parameters": (1.3e6, 8.5e7), "sparsity": (0.0, 0.875), "tokens": (1.6e10, 6.6e10)}),
    knob=Knob("sparsity", (0.0, 0.5, 0.7, 0.75, 0.9), dense=0.0, least=0.0, below=1.0),
    sizes={"with zeros": _with_zeros, "as good as dense": sparse_equivalent},
    remarks=("FLOPs are ideal: zeros cost nothing and are there from the first step; pruning on the way costs more",),
)

LAWS = {
    "chinchilla": CHINCHILLA,
    "hoffmann": HOFFMANN,
    "joint": JOINT,
    "fine_grained": FINE_GRAINED,
    "clark": CLARK,
    "abnar": ABNAR,
    "sparse": SPARSE,
}
"""By their names on the command line."""

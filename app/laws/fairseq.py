"""How fairseq's MoE paper counts compute, and its speed-up factor (Artetxe et al. 2021, arXiv 2112.10684)."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from modules.errors import InputError

Curve = Sequence[tuple[float, float]]
"""Pairs of compute and loss."""


def training_flops(
    layers: int, width: int, tokens: float, seq_len: int = 2048, vocab_size: int = 50257, is_moe: bool = False
) -> float:
    """FLOPs with recomputed activations (Narayanan et al., arXiv 2104.04473): 96 T l h² (1 + s/6h + V/16lh).

    Top-2 routing in every other layer adds a third: a second expert of 16 h² in half of the layers.
    """
    inside = 1 + seq_len / (6 * width) + vocab_size / (16 * layers * width) + (1 / 3 if is_moe else 0)
    return 96 * tokens * layers * width**2 * inside


def speed_up(dense: Curve, compute: float, loss: float) -> float:
    """How many times the compute a dense model takes to the same loss, between dense points on logarithmic scales.

    Raises:
        InputError: fewer than two dense points; losses that do not fall with compute; a loss that none of them reaches,
            or that all of them pass: nothing is extrapolated.
    """
    if len(dense) < 2:
        raise InputError(f"a curve of {len(dense)} dense models cannot be interpolated; give at least 2")
    points = sorted(dense, key=lambda point: point[1])
    if any(later[0] >= earlier[0] for earlier, later in pairwise(points)):
        raise InputError(
            "the losses of the dense models do not fall with their compute; give them budgets further apart"
        )
    losses = [math.log(point[1]) for point in points]
    if not losses[0] <= math.log(loss) <= losses[-1]:
        raise InputError(
            f"loss {loss:.4g} is outside of the dense models' {points[0][1]:.4g} to {points[-1][1]:.4g}; nothing is "
            "extrapolated: train a larger or a smaller dense model"
        )
    equal = math.exp(float(np.interp(math.log(loss), losses, [math.log(point[0]) for point in points])))
    return equal / compute

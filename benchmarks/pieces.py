"""Where a routed-expert layer of ours spends its time: its parts clocked, forward and backward, inside a whole run."""

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.timing import now
from callbacks.step_parts import REST, PartClock, Spot, clocked_functions
from modules.layers.experts import RoutedExperts

PIECES = ("routing", "sorting", "dispatch", "experts", "combine")
"""Routing is what the others leave of the whole: logits, choice, gates, what is watched, routing losses, the loss."""

Pieces = dict[tuple[str, str], float]
"""Seconds of a piece in a direction."""


def clock_run(layer: RoutedExperts, forward: Callable[[], Tensor], device: str) -> Pieces:
    """Seconds of each piece and direction in one run; the whole is under ("whole", direction).

    Args:
        layer: the layer that `forward` runs through.
        forward: gives the loss; gradients of the layer are set to None here.
        device: cpu or cuda.
    """
    clock = PartClock(torch.device(device), lambda _: now(device))
    layer.zero_grad(set_to_none=True)
    seconds: Pieces = {}

    def take(direction: str) -> None:
        clock.switch(REST)
        for part, value in clock.seconds.items():
            seconds["routing" if part == REST else part, direction] = value
        seconds["whole", direction] = sum(clock.seconds.values())
        clock.seconds.clear()

    with clocked_functions(_spots(layer), clock):
        clock.start()
        loss = forward()
        take("forward")
        loss.backward()
        take("backward")
    return seconds


def _spots(layer: RoutedExperts) -> list[Spot]:
    """The functions that are clocked; expert choice sorts elsewhere."""
    return [
        (sys.modules[type(layer.router).__module__], "dispatch_all", "sorting"),
        (layer.dispatcher, "dispatch", "dispatch"),
        (layer.experts, "forward", "experts"),
        (layer.dispatcher, "combine", "combine"),
    ]


def fastest(runs: Sequence[Pieces]) -> Pieces:
    """The run that others disturbed least."""
    return min(runs, key=lambda run: both_ways(run, "whole"))


def both_ways(seconds: Pieces, *pieces: str) -> float:
    """Forward and backward of some pieces together."""
    return sum(seconds.get((piece, direction), 0.0) for piece in pieces for direction in ("forward", "backward"))

"""Where a routed-expert layer of ours spends its time: its parts clocked, forward and backward, inside a whole run."""

import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import now
from modules.layers.experts import RoutedExperts

PIECES = ("routing", "sorting", "dispatch", "experts", "combine")
"""Routing is what the others leave of the whole: logits, choice, gates, what is watched, routing losses, the loss."""

Pieces = dict[tuple[str, str], float]
"""Seconds of a piece in a direction."""


class PieceClock:
    """Seconds of each piece and direction; a piece's backward runs from its outputs' gradients to its inputs'."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._last = 0.0

    def start(self) -> None:
        """The next `stop` counts from here."""
        self._last = now(self.device)

    def stop(self, piece: str, direction: str) -> None:
        """Add what has passed since the last start or stop."""
        time = now(self.device)
        self.seconds[piece, direction] += time - self._last
        self._last = time

    def watch(self, piece: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, clocked."""

        @functools.wraps(function)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            args = tuple(_Mark.apply(arg, self, piece, False) if _has_grad(arg) else arg for arg in args)
            self.start()
            result = function(*args, **kwargs)
            self.stop(piece, "forward")
            return _Mark.apply(result, self, piece, True) if _has_grad(result) else result

        return clocked


class _Mark(torch.autograd.Function):
    """The identity; in backward it starts or stops the clock of a piece."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, clock: PieceClock, piece: str, starts: bool) -> Tensor:
        ctx.clock, ctx.piece, ctx.starts = clock, piece, starts
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.starts:
            ctx.clock.start()
        else:
            ctx.clock.stop(ctx.piece, "backward")
        return grads[0], None, None, None


def _has_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


@contextmanager
def watched(layer: RoutedExperts, clock: PieceClock) -> Iterator[None]:
    """Clock the parts of one layer for the time of the context."""
    spots: list[tuple[Any, str, str]] = [
        (sys.modules[type(layer.router).__module__], "dispatch_all", "sorting"),
        (layer.dispatcher, "dispatch", "dispatch"),
        (layer.experts, "forward", "experts"),
        (layer.dispatcher, "combine", "combine"),
    ]
    spots = [spot for spot in spots if hasattr(spot[0], spot[1])]
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in spots]
    for owner, name, piece in spots:
        setattr(owner, name, clock.watch(piece, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, own in before:
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


def clock_run(layer: RoutedExperts, forward: Callable[[], Tensor], device: str) -> Pieces:
    """Seconds of each piece and direction in one run; the whole is under ("whole", direction).

    Args:
        layer: the layer that `forward` runs through.
        forward: gives the loss; gradients of the layer are set to None here.
        device: cpu or cuda.
    """
    clock = PieceClock(device)
    layer.zero_grad(set_to_none=True)
    with watched(layer, clock):
        start = now(device)
        loss = forward()
        middle = now(device)
        loss.backward()
        whole = {"forward": middle - start, "backward": now(device) - middle}
    for direction, seconds in whole.items():
        others = sum(clock.seconds[piece, direction] for piece in PIECES if piece != "routing")
        clock.seconds["whole", direction] = seconds
        clock.seconds["routing", direction] = seconds - others
    return dict(clock.seconds)


def fastest(runs: Sequence[Pieces]) -> Pieces:
    """The run that others disturbed least."""
    return min(runs, key=lambda run: both_ways(run, "whole"))


def both_ways(seconds: Pieces, *pieces: str) -> float:
    """Forward and backward of some pieces together."""
    return sum(seconds.get((piece, direction), 0.0) for piece in pieces for direction in ("forward", "backward"))

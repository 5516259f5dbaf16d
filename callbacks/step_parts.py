"""Where a training step spends its time: parts of the model, forward and backward, and the collectives in them."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modules.layers.experts import RoutedExperts
from modules.layers.transformer import Block, Transformer

REST = "rest"
PARTS = ("attention", "feed-forward", "routing", "expert products", "loss", "optimizer", "communication", REST)
"""Routing is a routed layer without its experts' products: scores, choice, dispatch and combination. The optimizer is
clipping and the update. The rest is the embedding, norms, residual sums, routing losses and what Python does."""

Spot = tuple[Any, str, str]
"""Owner and name of a function that is clocked, and its part."""


class PartClock:
    """Seconds of each part; at any time exactly one part is under way.

    A part's backward runs from its outputs' gradients to its inputs'. On a GPU every change of parts waits for the
    device: a step that is clocked takes longer than another one, and only shares should be read from it.

    Args:
        device: what is waited for.
        read: the time in seconds, after waiting for the device; `now` when left out.
    """

    def __init__(self, device: torch.device, read: Callable[[torch.device], float] | None = None) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.current = REST
        self._read = read or now
        self._last = 0.0

    def start(self) -> None:
        """Count from here."""
        self._last, self.current = self._read(self.device), REST

    def switch(self, part: str) -> str:
        """From here on the time is another part's; returns the former one."""
        moment = self._read(self.device)
        self.seconds[self.current] += moment - self._last
        self._last, former, self.current = moment, self.current, part
        return former

    def watch(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, clocked."""

        @functools.wraps(function)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            outside = self.switch(part)
            result = function(*(self._marked(arg, outside) for arg in args), **kwargs)
            if isinstance(result, tuple):
                result = tuple(self._marked(item, part) for item in result)
            else:
                result = self._marked(result, part)
            self.switch(outside)
            return result

        return clocked

    def _marked(self, value: Any, part: str) -> Any:
        """The same, and its gradient's arrival begins a part."""
        return _Mark.apply(value, self, part) if isinstance(value, Tensor) and value.requires_grad else value


class _Mark(torch.autograd.Function):
    """The identity; its backward begins a part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, clock: PartClock, part: str) -> Tensor:
        ctx.clock, ctx.part = clock, part
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.clock.switch(ctx.part)
        return grads[0], None, None


class _Collectives(TorchDispatchMode):
    """Gives the time of each collective, from its call to its end, to communication."""

    def __init__(self, clock: PartClock) -> None:
        super().__init__()
        self.clock = clock

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, torch.distributed.tensor.DTensor) for kind in types):
            return NotImplemented  # DTensor calls again, with its parts
        if func.namespace not in ("c10d", "_c10d_functional"):
            return func(*args, **(kwargs or {}))
        outside = self.clock.switch("communication")
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.ScriptObject):
                torch.distributed.Work.unbox(leaf).wait()
        self.clock.switch(outside)
        return result


@contextmanager
def watched(network: Transformer, clock: PartClock, is_alone: bool) -> Iterator[None]:
    """Clock the parts of a network for the time of the context.

    Args:
        network: not compiled (see `can_be_watched`).
        is_alone: no other process trains with this one, so that nothing is communicated.
    """
    with clocked_functions(_spots(network), clock), ExitStack() as stack:
        if not is_alone:
            stack.enter_context(_Collectives(clock))
        yield


def can_be_watched(network: Transformer) -> bool:
    """A compiled block cannot be taken apart."""
    return not any(getattr(block, "_compiled_call_impl", None) for block in network.blocks)


def _spots(network: Transformer) -> Iterator[Spot]:
    """The functions of a network that are clocked."""
    for block in network.blocks:
        assert isinstance(block, Block)
        layer = block.feed_forward
        yield block.attention, "forward", "attention"
        if isinstance(layer, RoutedExperts):
            yield layer, "forward", "routing"
            yield layer.experts, "forward", "expert products"
            if layer.shared is not None:
                yield layer.shared, "forward", "feed-forward"
        else:
            yield layer, "forward", "feed-forward"
    yield network, "cross_entropy", "loss"


@contextmanager
def clocked_functions(spots: Iterable[Spot], clock: PartClock) -> Iterator[None]:
    """Clock functions for the time of the context."""
    before = []
    try:
        for owner, name, part in spots:
            before.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, clock.watch(part, getattr(owner, name)))
        yield
    finally:
        for owner, name, own in reversed(before):
            if own is None:  # it is its class's
                delattr(owner, name)
            else:
                setattr(owner, name, own)


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

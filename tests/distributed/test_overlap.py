"""Shared experts compute while rows, and later their gradients, are on their way between processes."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from app.strategies import dispatchers
from modules.layers.experts import RoutedExperts
from modules.layers.feedforward import FeedForward
from tests.distributed.ranks import together
from tests.distributed.test_layouts import CASES


def watch(layer: RoutedExperts) -> list[str]:
    """What happens in a forward and a backward pass of a layer, in its order."""
    seen: list[str] = []
    send, wait, shared = dispatchers.all_to_all_single, dispatchers.wait_tensor, FeedForward.forward

    def logged(what: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if not (what == "send" and arguments[1] is None):  # counts go before everything
                seen.append(what)
            return function(*arguments, **options)

        return call

    assert layer.shared is not None
    layer.shared.down.weight.register_hook(lambda grad: seen.append("shared gradient"))
    layer.experts.down.register_hook(lambda grad: seen.append("experts' gradient"))
    with (
        patch.object(dispatchers, "all_to_all_single", logged("send", send)),
        patch.object(dispatchers, "wait_tensor", logged("wait", wait)),
        patch.object(FeedForward, "forward", logged("shared", shared)),
    ):
        hidden = torch.randn(2, 8, layer.shared.down.weight.shape[0], dtype=torch.float64, requires_grad=True)
        layer(hidden)[0].square().sum().backward()
    return seen


def half_of_the_experts() -> RoutedExperts:
    """A routed layer with shared experts, on two processes."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    layer = RoutedExperts(CASES["shared, fine, softmax first"].config)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight)
    number = layer.router.moe.num_experts // 2
    begin = number * dist.get_rank()
    for name, weight in layer.experts.named_parameters():
        setattr(layer.experts, name, torch.nn.Parameter(weight.detach()[begin : begin + number]))
    assert dist.group.WORLD is not None
    layer.dispatcher = dispatchers.AllToAllDispatcher(dist.group.WORLD, 2 * number)
    return layer


def overlapped() -> None:
    """In each process."""
    dist.init_process_group("gloo")
    order = watch(half_of_the_experts())
    assert order[:3] == ["send", "shared", "wait"], order
    assert order[3:] == ["send", "shared gradient", "experts' gradient"], order
    dist.barrier()
    dist.destroy_process_group()


def test_rows_travel_while_shared_experts_compute(tmp_path: Path) -> None:
    together(2, tmp_path, overlapped)

"""The processes that train one model together, as the model and its optimizer see them.

A network is written for one process. Where several train it, each holds a part of every parameter, and what concerns
all of it goes through here: `app.strategies` has the world of many processes, this module that of one.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Region = tuple[slice, ...]
"""A block of a tensor: one interval for each dimension."""


class World(Protocol):
    """Who holds what. Methods that say "all ranks together" wait for the others, and must be called by each of them."""

    @property
    def data_ranks(self) -> int:
        """How many processes train on different samples."""
        ...

    @property
    def data_rank(self) -> int:
        """The number of this process among them; those that share its samples have the same."""
        ...

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """The sum over processes with different samples; all ranks together."""
        ...

    def share(self, amount: int, like: Tensor) -> Tensor | float:
        """What part this process has of something that processes with different samples count; all ranks together."""
        ...

    def largest(self, number: int) -> int:
        """The largest of the numbers that all ranks give; all ranks together."""
        ...

    def place(self, network: Any, device: torch.device) -> None:
        """Give memory on `device` to a network on the meta device: to the part of it that this process holds."""
        ...

    def settle(self, network: Any) -> None:
        """Leave each process with its part alone, also of what a forward pass without a backward pass has gathered."""
        ...

    def region(self, tensor: Tensor) -> Region:
        """Which part of a parameter this process holds."""
        ...

    def local(self, tensor: Tensor) -> Tensor:
        """This process's part of a parameter or of its optimizer state, in the same memory."""
        ...

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a parameter or of its optimizer state; all ranks together."""
        ...

    def part(self, whole: Tensor, like: Tensor) -> Tensor:
        """A tensor that is shared out like the parameter `like`, from all of it."""
        ...

    def product_dtype(self, weights: torch.dtype) -> torch.dtype:
        """The type in which blocks compute where no autocast is on, of weights in a type."""
        ...

    def gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of all gradients, each entry counted once; all ranks together."""
        ...


class OneProcess:
    """The world of a process that trains alone: it holds everything."""

    data_ranks = 1
    data_rank = 0

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor

    def share(self, amount: int, like: Tensor) -> float:
        """All of it."""
        return 1.0

    def largest(self, number: int) -> int:
        """The number."""
        return number

    def place(self, network: nn.Module, device: torch.device) -> None:
        """Memory for all of it."""
        network.to_empty(device=device)

    def settle(self, network: Any) -> None:
        """All is its part."""

    def region(self, tensor: Tensor) -> Region:
        """All of it."""
        return tuple(slice(0, size) for size in tensor.shape)

    def local(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor

    def whole(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor

    def part(self, whole: Tensor, like: Tensor) -> Tensor:
        """All of it, with the type and on the device of `like`."""
        return whole.contiguous() if like.is_meta else whole.to(like).contiguous()

    def product_dtype(self, weights: torch.dtype) -> torch.dtype:
        """That of the weights."""
        return weights

    def gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Their global norm."""
        return torch.nn.utils.get_total_norm(list(gradients))


ONE_PROCESS = OneProcess()


@torch.no_grad()
def fill(world: World, network: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Give a network the values of whole tensors, of which each process takes its part.

    Raises:
        RuntimeError: values are missing, or too many.
    """
    targets = network.state_dict()
    for name, whole in tensors:
        target = targets.pop(name, None)
        if target is None:
            raise RuntimeError(f"the network has no {name}")
        world.local(target).copy_(whole[world.region(target)])
    if targets:
        raise RuntimeError(f"no values for {', '.join(targets)}")


def world_of(trainer: Any) -> World:
    """The world of a trainer's strategy; no trainer, or a strategy of Lightning's own, is one process."""
    return getattr(getattr(trainer, "strategy", None), "world", ONE_PROCESS)

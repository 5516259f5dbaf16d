"""Counting what collectives carry, as they are called: in a real run, or in a fake one."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
KINDS: tuple[Kind, ...] = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")

_CALLED: dict[str, Kind] = {
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
}
_QUIET = ("wait_tensor", "_wrap_tensor_autograd", "barrier")


@dataclass
class Tally:
    """Bytes and calls by kind of collective.

    Bytes are those of the larger side of a call: what a rank has after an all-gather, before a reduce-scatter, on both
    sides of an all-reduce, and what it sends in an all-to-all, to itself too.
    """

    num_bytes: Counter[Kind] = field(default_factory=Counter)
    calls: Counter[Kind] = field(default_factory=Counter)

    def add(self, kind: Kind, num_bytes: int, calls: int = 1) -> None:
        """So many calls that carry so many bytes together."""
        self.num_bytes[kind] += num_bytes
        self.calls[kind] += calls


@contextmanager
def count_collectives() -> Iterator[Tally]:
    """Count the collectives that this process calls, forward and backward."""
    tally = Tally()
    with _Watch(tally):
        yield tally


class _Watch(TorchDispatchMode):
    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls again, with its parts
        result = func(*args, **(kwargs or {}))
        name = func._opname
        if func.namespace in ("c10d", "_c10d_functional") and name not in _QUIET:
            kind = _CALLED[name]  # an unknown collective is an error: it would go uncounted
            sent = max(map(_num_bytes, tree_leaves(args)), default=0)
            received = max(map(_num_bytes, tree_leaves(result)), default=0)
            self.tally.add(kind, sent if kind == "all_to_all" else max(sent, received))
        return result


def _num_bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0

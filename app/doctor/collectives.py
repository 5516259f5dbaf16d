"""Collective operations: whether they give what they should, and how much they move in a second.

Letters: N ranks of a group, C values that each rank has for each other.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from app.doctor.findings import Problem, Section

SIZES = {"cpu": (2**16, 2**20, 2**24), "cuda": (2**20, 2**24, 2**28)}
"""Bytes of each rank's tensor at which operations are timed."""
MOST_REPEATS = 20


@dataclass(frozen=True)
class Operation:
    """A collective operation on a tensor [N·C] of each rank.

    Attributes:
        run: from an output and an input of the sizes below, and a group, to the tensor that has the result.
        output_parts, input_parts: sizes as multiples of C; 0 stands for N.
        expected: what rank r of N gets for C = 1.
        factor: bytes over the slowest link, as a multiple of the larger size times (N-1)/N.
    """

    run: Callable[[Tensor, Tensor, dist.ProcessGroup], Tensor]
    output_parts: int
    input_parts: int
    expected: Callable[[int, int], list[int]]
    factor: int = 1


def _all_reduce(output: Tensor, given: Tensor, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(given, group=group)
    return given


def _all_gather(output: Tensor, given: Tensor, group: dist.ProcessGroup) -> Tensor:
    dist.all_gather_into_tensor(output, given, group)
    return output


def _reduce_scatter(output: Tensor, given: Tensor, group: dist.ProcessGroup) -> Tensor:
    dist.reduce_scatter_tensor(output, given, group=group)
    return output


def _all_to_all(output: Tensor, given: Tensor, group: dist.ProcessGroup) -> Tensor:
    dist.all_to_all_single(output, given, group=group)
    return output


def _sum(n: int, place: int) -> int:
    """Of what all ranks have at a place: 100 · rank + place."""
    return 100 * n * (n - 1) // 2 + n * place


OPERATIONS = {
    "all-reduce": Operation(_all_reduce, 0, 0, lambda r, n: [_sum(n, i) for i in range(n)], 2),
    "all-gather": Operation(_all_gather, 0, 1, lambda r, n: [100 * i for i in range(n)]),
    "reduce-scatter": Operation(_reduce_scatter, 1, 0, lambda r, n: [_sum(n, r)]),
    "all-to-all": Operation(_all_to_all, 0, 0, lambda r, n: [100 * i + r for i in range(n)]),
}


def groups_of(hosts: Sequence[str]) -> dict[str, list[list[int]]]:
    """Ranks that are looked at together, by what they show: all; where there are several hosts, also those of each
    host, and the first of each."""
    found = {"all ranks": [list(range(len(hosts)))]}
    names = list(dict.fromkeys(hosts))
    if 1 < len(names) < len(hosts):
        members = [[rank for rank, host in enumerate(hosts) if host == name] for name in names]
        found["within a host"] = [ranks for ranks in members if len(ranks) > 1]
        found["across hosts"] = [[ranks[0] for ranks in members]]
    return found


def check_collectives(device: torch.device, hosts: Sequence[str], seconds: float) -> Section:
    """Run every operation in every group; all ranks together. The speeds are those of the slowest group.

    Args:
        device: where the tensors are.
        hosts: of each rank.
        seconds: for all measurements together.
    """
    sizes = SIZES[device.type]
    speeds = tuple(f"{_size(size)}: GB/s" for size in sizes)
    section = Section(f"Collectives ({dist.get_backend()})", ("operation", "among", "result", *speeds))
    groups = groups_of(hosts)
    each = seconds / (len(groups) * len(OPERATIONS) * len(sizes))
    for among, members in groups.items():
        made = [dist.new_group(ranks) for ranks in members]  # all ranks make all groups, in one order
        group = next((g for g, ranks in zip(made, members, strict=True) if dist.get_rank() in ranks), None)
        for name, operation in OPERATIONS.items():
            reason = "" if group is None else _wrong(operation, group, device)
            wrong = _worst(0.0 if not reason else 1.0, device) > 0
            cells = []
            for size in sizes:
                rate = _rate(operation, group, size, device, each) if not wrong else 0.0
                cells.append(f"{-_worst(-rate, device) / 1e9:,.3g}" if not wrong else "")
            section.rows.append((name, among, "wrong" if wrong else "right", *cells))
            if wrong:
                fix = "run again with NCCL_DEBUG=INFO, and with NCCL_P2P_DISABLE=1 to see whether it is the links"
                section.problems.append(Problem(f"{name} among {among} gives wrong results {reason}".strip(), fix))
    return section


def _wrong(operation: Operation, group: dist.ProcessGroup, device: torch.device) -> str:
    """What is wrong with the operation's result on known numbers; empty when it is right."""
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    given = torch.arange(operation.input_parts or n, device=device, dtype=torch.float32) + 100 * rank
    output = torch.full((operation.output_parts or n,), -1.0, device=device)
    result = operation.run(output, given, group).tolist()
    expected = [float(value) for value in operation.expected(rank, n)]
    return "" if result == expected else f"({result[:4]} in the place of {expected[:4]} on rank {rank})"


def _rate(
    operation: Operation, group: dist.ProcessGroup | None, size: int, device: torch.device, limit: float
) -> float:
    """Bytes over a link in a second, as nccl-tests counts them; infinite for a rank that is in no group."""
    if group is None:
        return float("inf")
    n = dist.get_world_size(group)
    count = max(1, size // 4 // n)
    given = torch.zeros(count * (operation.input_parts or n), device=device)
    output = torch.zeros(count * (operation.output_parts or n), device=device)
    operation.run(output, given, group)
    once = torch.tensor(_seconds(operation, output, given, group, 1), device=device)
    dist.all_reduce(once, dist.ReduceOp.MAX, group)
    repeats = max(1, min(MOST_REPEATS, int(limit / max(1e-9, once.item()))))
    taken = _seconds(operation, output, given, group, repeats) / repeats
    return 4 * count * n * operation.factor * (n - 1) / n / taken


def _seconds(operation: Operation, output: Tensor, given: Tensor, group: dist.ProcessGroup, repeats: int) -> float:
    """Of some runs one after the other; the result is read, so that they are finished also on a GPU."""
    result = output
    result[0].item()
    started = time.perf_counter()
    for _ in range(repeats):
        result = operation.run(output, given, group)
    result[0].item()
    return time.perf_counter() - started


def _worst(value: float, device: torch.device) -> float:
    """The largest value of any rank."""
    everyone = torch.tensor(value, device=device)
    dist.all_reduce(everyone, dist.ReduceOp.MAX)
    return everyone.item()


def _size(size: int) -> str:
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"

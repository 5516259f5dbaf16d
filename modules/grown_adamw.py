"""AdamW for parameters that have grown: new entries have an age and a learning rate of their own.

A new entry whose moments start from zero in an old parameter would take steps far too large: AdamW's bias correction
goes by the parameter's step count, and so its second moment counts as complete (3 times the learning rate at once, with
betas of 0.9 and 0.999). Here each new entry is corrected by its own age (the asymmetric state of SPARKLING, arXiv
2602.02472), and its learning rate warms up anew.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from modules.world import ONE_PROCESS, Region, World

BIRTHS = "births"
"""Key of a parameter's optimizer state: a list of births, oldest first."""

Birth = dict[str, Any]
"""`old`: along every axis, the size of the part that was there before, or its indices where they are not the first;
`step`: the parameter's step count when the rest came; `factor`, `steps`: the rest's learning rate rises to `factor`
times the schedule's within so many steps, and returns likewise."""

Box = tuple[slice | list[int], ...]

_FORGOTTEN = 1e-6
"""A bias correction that differs from 1 by less makes no difference in float32."""


class GrownAdamW(torch.optim.AdamW):
    """Torch's fused AdamW, and behind it a correction of the entries that are still young.

    Where processes share parameters out, each of them updates its parts.
    """

    def __init__(self, groups: Iterable[Any], world: World = ONE_PROCESS, **settings: Any) -> None:
        self.world = world
        super().__init__(groups, **settings)

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        """Collects what torch's update works on: parameters, gradients, moments and step counts."""
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            if isinstance(tensors, list):
                tensors[:] = [self.world.local(tensor) for tensor in tensors]
        return has_complex

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()  # first: it makes the gradients
        young = [(group, p) for group in self.param_groups for p in group["params"] if self._is_young(p)]
        before = [
            [self._part(parameter)[box].clone() for box in self._young_boxes(parameter)] for _, parameter in young
        ]
        super().step()
        for (group, parameter), entries in zip(young, before, strict=True):
            self._correct(group, parameter, entries)
        return loss

    def _is_young(self, parameter: Tensor) -> bool:
        return parameter.grad is not None and bool(self.state.get(parameter, {}).get(BIRTHS))

    def _part(self, tensor: Tensor) -> Tensor:
        return self.world.local(tensor)

    def _young_boxes(self, parameter: Tensor) -> Iterator[Box]:
        """Where this process's young entries are, birth by birth."""
        for birth in self.state[parameter][BIRTHS]:
            yield from _boxes(parameter.shape, birth["old"], self.world.region(parameter))

    def _correct(self, group: Mapping[str, Any], parameter: Tensor, before: list[Tensor]) -> None:
        """Write the young entries again, from what they were before the step; later births overrule earlier ones."""
        state = self.state[parameter]
        count, (beta1, beta2), lr = float(state["step"]), group["betas"], group["lr"]
        moments, part, region = (
            (state["exp_avg"], state["exp_avg_sq"]),
            self._part(parameter),
            self.world.region(parameter),
        )
        averages, squares = map(self._part, moments)
        remaining = iter(before)
        for birth in state[BIRTHS]:
            age = count - birth["step"]
            rate = lr * warm_up_factor(birth, age)
            for box, old in zip(_boxes(parameter.shape, birth["old"], region), remaining, strict=False):
                first = averages[box] / (1 - beta1**age)
                second = squares[box] / (1 - beta2**age)
                update = first / second.sqrt_().add_(group["eps"])
                part[box] = old.mul_(1 - rate * group["weight_decay"]).sub_(update, alpha=rate)
        state[BIRTHS] = [birth for birth in state[BIRTHS] if not is_grown_up(birth, count, max(beta1, beta2))]


def warm_up_factor(birth: Mapping[str, Any], age: float) -> float:
    """What the learning rate of new entries is multiplied with at their age, in steps."""
    rise, steps = birth["factor"] - 1, birth["steps"]
    if steps == 0:
        return 1.0
    return 1 + rise * max(0.0, min(age / steps, 2 - age / steps))


def warmed_rates(parameter: Tensor, births: Iterable[Birth], count: float) -> Tensor:
    """What each entry's learning rate is multiplied with after `count` updates; later births overrule earlier ones."""
    rates = torch.ones_like(parameter)
    for birth in births:
        for box in _boxes(parameter.shape, birth["old"]):
            rates[box] = warm_up_factor(birth, count - birth["step"])
    return rates


def is_grown_up(birth: Mapping[str, Any], count: float, beta: float) -> bool:
    """Whether a birth makes no difference any more: its moments are complete, and its warm-up is over."""
    age = count - birth["step"]
    return beta**age < _FORGOTTEN and age >= 2 * birth["steps"]


def _boxes(shape: torch.Size, old: list[int | list[int]], region: Region | None = None) -> Iterator[Box]:
    """Blocks that together are all of a tensor but what is old along every axis; of a part of it, by the places there.

    Args:
        region: the part.
    """
    for axis, (kept, size) in enumerate(zip(old, shape, strict=True)):
        if (kept if isinstance(kept, int) else len(kept)) < size:
            inside = (slice(0, before) if isinstance(before, int) else before for before in old[:axis])
            behind = (slice(None) for _ in old[axis + 1 :])
            new = slice(kept, None) if isinstance(kept, int) else sorted(set(range(size)) - set(kept))
            box = (*inside, new, *behind)
            yield box if region is None else tuple(map(_inside, box, region))


def _inside(places: slice | list[int], interval: slice) -> slice | list[int]:
    """Places along an axis that lie in an interval, counted from its beginning."""
    begin, end = interval.start, interval.stop
    if isinstance(places, list):
        return [place - begin for place in places if begin <= place < end]
    start = min(max(places.start or 0, begin), end)
    stop = end if places.stop is None else max(start, min(places.stop, end))
    return slice(start - begin, stop - begin)

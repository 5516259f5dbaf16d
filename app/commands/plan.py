"""`growmoe plan`: what a run of the same configuration would be, stage by stage; nothing is trained or written."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from app.plan import PlannedStage, advise
from app.training import TrainingCLI
from modules.growth.stage import GrowthStage

if TYPE_CHECKING:
    from rich.table import Table


class PlanCLI(TrainingCLI):
    """The options of `fit`; every check of `fit`, and then a table instead of a run."""

    def before_fit(self) -> None:
        """Print the plan, and end."""
        show(self.plan())
        sys.exit(0)


def show(stages: Sequence[PlannedStage]) -> None:
    """The table of stages, and the advice, on standard output."""
    from rich.console import Console

    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 160
    console.print(_table(stages))
    for line in advise(stages):
        console.print(line, highlight=False)


def _table(stages: Sequence[PlannedStage]) -> "Table":
    from rich.table import Table

    table = Table(title="weights, gradients and optimizer state in float32; activations come on top")
    for name in ("stage", "model"):
        table.add_column(name)
    for name in ("steps", "tokens", "parameters", "active", "FLOPs per token", "FLOPs", "memory"):
        table.add_column(name, justify="right")
    for stage in stages:
        config, count = stage.config, stage.count
        experts = f", {config.moe.num_experts} experts in {len(config.routed_layers)}" if config.moe else ""
        steps = f"{_known(stage.first_step)}-{_known(stage.last_step)}"
        cells = [_count(stage.tokens), _count(count.total), _count(count.active), _count(stage.flops_per_token)]
        cells += [_count(stage.flops), f"{stage.state_bytes / 2**30:.2f} GiB"]
        begin = "start" if stage.transition is None else _methods(stage.transition)
        table.add_row(begin, f"{config.dim} wide, {config.num_layers} layers{experts}", steps, *cells)
    return table


def _methods(transition: GrowthStage) -> str:
    return f"{transition.preset or ''} {transition.trigger}".strip()


def _known(step: int | None) -> str:
    return "?" if step is None else f"{step:,}"


def _count(number: float | None) -> str:
    if number is None:
        return "?"
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}"

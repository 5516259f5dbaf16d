"""`growmoe plan`: what a run of the same configuration would be, stage by stage; nothing is trained or written."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.plugins.environments import LightningEnvironment

from app.plan import PlannedStage, advise
from app.scale.estimate import ScaleEstimate, estimate
from app.scale.hardware import Hardware
from app.scale.workload import Workload, number_bytes
from app.strategies import ExpertParallelStrategy
from app.training import TrainingCLI
from modules.errors import require_positive
from modules.growth.stage import GrowthStage

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


class PlanCLI(TrainingCLI):
    """The options of `fit`; every check of `fit`, and then tables instead of a run."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Beside those of `fit`, the machine that is thought of."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--world_size", type=int | None, default=None, help="processes to plan for; empty: those at hand"
        )
        parser.add_class_arguments(Hardware, "hardware")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer of so many processes, none of which is started; where no number is given, that of `fit`."""
        world_size = self._get(self.config_init, "world_size")
        if world_size is not None:
            require_positive(world_size=world_size)
            given = self._get(self.config_init, "trainer")
            kwargs |= {"accelerator": "cpu", "devices": world_size, "num_nodes": 1}
            kwargs["plugins"] = [*(given["plugins"] or []), LightningEnvironment()]
            if given["strategy"] == "auto" and world_size > 1:
                kwargs["strategy"] = ExpertParallelStrategy()
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Print the plan, and end."""
        stages = self.plan()
        estimates = [self._estimate(stage) for stage in stages] if self.trainer.world_size > 1 else []
        console = _console()
        show(stages, console)
        if estimates:
            show_scale(estimates, console)
        sys.exit(0)

    def _estimate(self, stage: PlannedStage) -> ScaleEstimate:
        strategy = self.trainer.strategy
        assert isinstance(strategy, ExpertParallelStrategy)
        parameter_bytes, compute_bytes = number_bytes(str(self.trainer.precision))
        work = Workload(
            stage.config,
            strategy.layout_of(stage.config),
            self.datamodule.batch_size,
            stage.seq_len,
            strategy.wrapping,
            self.trainer.accumulate_grad_batches,
            self.model.loss_chunk_rows,
            parameter_bytes,
            compute_bytes,
            stage.is_muon,
            is_gathered=strategy.checkpoints == "gathered",
        )
        return estimate(work, self._get(self.config_init, "hardware"))


def show(stages: Sequence[PlannedStage], console: "Console") -> None:
    """The table of stages, and the advice."""
    console.print(_table(stages))
    for line in advise(stages):
        console.print(line, highlight=False)


def show_scale(estimates: Sequence[ScaleEstimate], console: "Console") -> None:
    """The table of many processes, what it assumes, and the warnings of each stage."""
    from app.scale.table import scale_table

    hardware = estimates[0].hardware
    console.print(scale_table(estimates))
    console.print(
        f"hardware assumed: {hardware.name}; {hardware.peak_flops / 1e12:.0f} TFLOP/s at MFU {hardware.mfu:.0%}, "
        f"{hardware.intra_bandwidth / 1e9:.0f} GB/s inside a node of {hardware.devices_per_node}, "
        f"{hardware.inter_bandwidth / 1e9:.0f} GB/s outside, {hardware.memory_bytes / 1e9:.0f} GB, balanced experts",
        highlight=False,
    )
    for number, each in enumerate(estimates, start=1):
        for line in each.warnings:
            console.print(f"warning, stage {number}: {line}", highlight=False, markup=False)


def _console() -> "Console":
    """Standard output; wide where nobody's window says how wide."""
    from rich.console import Console

    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 160
    return console


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

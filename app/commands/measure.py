"""`growmoe measure`: what a step of the same configuration takes, stage by stage, and where its time goes."""

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser

from app.measurement import Batch, describe_machine, measurement_record, peak_of
from app.outputs import check_new_output
from app.report.words import architecture, short
from app.strategies import ExpertParallelStrategy
from app.training import TrainingCLI
from callbacks.step_meter import StepMeter
from callbacks.step_parts import PARTS
from modules.errors import InputError
from modules.files import replace_file
from modules.growth.stage import GrowthStage

if TYPE_CHECKING:
    from rich.table import Table


class MeasureCLI(TrainingCLI):
    """The options of `fit`; a few steps of each stage instead of a run. Nothing is saved but the record."""

    verb = "measure"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Beside those of `fit`, how many steps, and where the record goes."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(StepMeter, "measure")
        parser.add_argument("--output", type=Path | None, default=None, help="a new JSON file for the record")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """A trainer that neither saves nor validates."""
        quiet = {"enable_checkpointing": False, "limit_val_batches": 0, "enable_progress_bar": False}
        return super().instantiate_trainer(**quiet, **kwargs)

    def own_callbacks(self, parts: dict[str, Any]) -> list[pl.Callback]:
        """The meter, growth, and the way out."""
        self.meter: StepMeter = self._get(self.config_init, "measure")
        return [self.meter, self.growth, self.stopper]

    def before_fit(self) -> None:
        """Every check of `fit` that needs no run directory; then stages one behind the other."""
        self.output: Path | None = self._get(self.config_init, "output")
        if self.output is not None:
            check_new_output(self.output)
        if self._get(self.config_init, "ckpt_path") is not None:
            raise InputError(
                "ckpt_path has no meaning for measure, which trains a few steps from the start; leave it out"
            )
        self.take_start()
        self.recipe, every = list(self.growth.stages), self.meter.steps_per_stage
        self.meter.num_stages = len(self.recipe) + 1
        least = max(every * self.meter.num_stages, self.model.schedule_config.warmup_steps) + 1
        self.trainer.fit_loop.epoch_loop.max_steps = max(least, self.trainer.max_steps)
        self.growth.is_logged = False
        self.growth.stages = [_moved(stage, every * number) for number, stage in enumerate(self.recipe, start=1)]
        self._check_recipe()
        self._check_data()

    def after_fit(self) -> None:
        """Print the figures, and write the record."""
        if self.stopper.received is not None:
            sys.exit(128 + self.stopper.received)
        if not self.trainer.is_global_zero:
            return
        module, strategy = self.model, self.trainer.strategy
        samples = self._tokens_per_step // self.datamodule.seq_len
        layout = str(strategy.layout_of()) if isinstance(strategy, ExpertParallelStrategy) else "one process"
        precision = str(self.trainer.precision)
        record = measurement_record(
            self.meter.stages,
            self.recipe,
            Batch(samples, self.datamodule.seq_len),
            describe_machine(module.device, self.trainer.world_size),
            layout,
            precision,
            peak_of(module.device, precision, self._get(self.config_init, "throughput").peak_flops),
        )
        _show(record)
        if self.output is not None:
            replace_file(self.output, (json.dumps(record, indent=1) + "\n").encode())


def _moved(stage: GrowthStage, step: int) -> GrowthStage:
    """The same transition behind a step."""
    return replace(stage, at_tokens=None, at_fraction=None, at_plateau=None, at_step=step)


def _show(record: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 160
    console.print(_figures(record))
    if any(stage["parts_s"] for stage in record["stages"]):
        console.print(_parts(record))
    machine, peak = record["machine"], record["peak"]
    console.print(
        f"{machine['devices']} x {machine['device']}; {record['layout']}; {record['precision']}; "
        f"{record['samples_per_step']} x {record['seq_len']} tokens a step; MFU of {peak['flops'] / 1e12:.3g} TFLOP/s "
        f"({peak['source']}), with the empty slots of a capacity",
        highlight=False,
    )


def _figures(record: dict[str, Any]) -> "Table":
    table = _new_table("median step after warm-up", ("active", "step", "quartiles", "tokens/s", "MFU", "peak"))
    for stage in record["stages"]:
        low, high = stage["step_s_quartiles"]
        table.add_row(
            architecture(stage["architecture"]),
            short(stage["parameters"]["active"]),
            f"{1000 * stage['step_s']:.4g} ms",
            f"{1000 * low:.4g} to {1000 * high:.4g}",
            f"{stage['tokens_per_s']:,.0f}",
            f"{stage['mfu']:.1%}",
            f"{stage['peak_mib']:,.0f} MiB",
        )
    return table


def _parts(record: dict[str, Any]) -> "Table":
    stages = record["stages"]
    parts = [name for name in ("input", *PARTS) if any(stage["parts_s"].get(name) for stage in stages)]
    table = _new_table("where it goes", parts)
    for stage in stages:
        shares = (stage["parts_s"].get(part, 0.0) / stage["step_s"] for part in parts)
        table.add_row(architecture(stage["architecture"]), *(f"{share:.1%}" for share in shares))
    return table


def _new_table(title: str, columns: Iterable[str]) -> "Table":
    from rich.table import Table

    table = Table("model", title=title)
    for name in columns:
        table.add_column(name, justify="right")
    return table

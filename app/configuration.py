"""The configuration of a run: its options, its trainer with our callbacks, and checks of length, recipe and data."""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from app import checkpoint as store
from app.checkpoint_io import DirectoryCheckpointIO
from app.parsing import OneLineParser
from app.start import start_from
from app.strategies import ExpertParallelStrategy
from app.trainer import checked, trainer_in
from app.wandb_log import WandbSettings
from callbacks.budget import Budget, run_cost
from callbacks.checkpointing import Checkpointing
from callbacks.console import Console
from callbacks.expert_load import ExpertLoad
from callbacks.final_validation import FinalValidation
from callbacks.growth import Growth
from callbacks.lm_evaluation import LMEvaluation
from callbacks.monitor import Monitor
from callbacks.safety import StopOnSignal
from callbacks.step_clock import StepClock
from callbacks.throughput import Throughput
from callbacks.training_log import TrainingLog
from datamodules.bilingual import BilingualText  # noqa: F401  (subclasses are found by name once imported)
from datamodules.synthetic_world import SyntheticWorld  # noqa: F401
from modules.config import ModelConfig
from modules.dense import DenseLM  # noqa: F401
from modules.errors import InputError
from modules.mixture import MoELM  # noqa: F401
from modules.moe_config import check_groups
from modules.world import world_of

VOCABULARY = "model.init_args.architecture.vocab_size"
CONFIGURABLE = {
    "throughput": Throughput,
    "expert_load": ExpertLoad,
    "growth": Growth,
    "budget": Budget,
    "evaluation": LMEvaluation,
    "monitor": Monitor,
    "console": Console,
    "checkpoint": Checkpointing,
}
"""Top-level keys of the configuration that set up a callback each."""


class RunParser(LightningArgumentParser, OneLineParser):
    """Lightning's parser, with errors of one line."""


class ConfiguredCLI(LightningCLI):
    """What all verbs have that take the configuration of a run.

    Attributes:
        verb: what a subclass that takes the options of `fit` is called on the command line.
    """

    verb = "fit"

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """`fit` and `validate`, without the arguments that the command line provides itself."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """A key for each configurable callback, W&B, and the vocabulary that comes from the data."""
        for key, callback in CONFIGURABLE.items():
            parser.add_class_arguments(callback, key)
        parser.add_class_arguments(WandbSettings, "wandb")
        parser.link_arguments("data.vocab_size", VOCABULARY, apply_on="instantiate")
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs/default",
                "trainer.num_sanity_val_steps": 0,
                "trainer.check_val_every_n_epoch": None,
                "trainer.val_check_interval": 500,
                "trainer.log_every_n_steps": 10,
                "trainer.gradient_clip_val": 1.0,
                "trainer.enable_model_summary": False,
                "trainer.use_distributed_sampler": False,
            }
        )

    def before_instantiate_classes(self) -> None:
        """The launcher starts the same command again for further processes: `measure` was parsed as `fit`."""
        sys.argv[1] = self.verb if self.subcommand == "fit" else sys.argv[1]

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer with our callbacks in their order; loggers join once every check has passed."""
        settings = checked(self._get(self.config_init, "trainer")) | kwargs
        parts = {key: self._get(self.config_init, key) for key in CONFIGURABLE}
        self.growth: Growth = parts["growth"]
        self.stopper = StopOnSignal()
        self.checkpoint_io = DirectoryCheckpointIO(self.datamodule)
        ours = self.own_callbacks(parts)
        if settings["enable_progress_bar"] is False and parts["console"] in ours:
            parts["console"].hide_bar()
            settings["enable_progress_bar"] = None  # Lightning refuses any console beside False
        settings["callbacks"] = [*(settings["callbacks"] or []), *ours]
        settings["plugins"] = [*(settings["plugins"] or []), self.checkpoint_io]
        self.extra_loggers = settings["logger"]
        settings["logger"] = False
        if self.subcommand != "fit":
            settings["enable_checkpointing"] = False
        return trainer_in(settings)

    def own_callbacks(self, parts: dict[str, Any]) -> list[pl.Callback]:
        """Our callbacks in their order.

        Args:
            parts: those of `CONFIGURABLE`, as configured.
        """
        if self.subcommand != "fit":
            return [self.stopper, parts["evaluation"], parts["console"]]
        clock = StepClock()
        return [
            clock,
            TrainingLog(),
            parts["throughput"],
            parts["expert_load"],
            self.growth,
            parts["budget"],
            self.stopper,
            parts["evaluation"],
            FinalValidation(),
            parts["monitor"],
            parts["console"],
            parts["checkpoint"],
            clock.last,
        ]

    # -- checks --------------------------------------------------------------------------------------------------------

    def take_start(self) -> bool:
        """Take the model of `model.start_from`; whether there is one."""
        if self.model.start_from is None:
            return False
        start_from(Path(self.model.start_from), self.model, self.datamodule)
        return True

    @property
    def _tokens_per_step(self) -> int:
        """Of one optimizer step, on all ranks."""
        ranks = world_of(self.trainer).data_ranks
        rows = self.datamodule.batch_size * ranks * self.trainer.accumulate_grad_batches
        return rows * self.datamodule.seq_len

    def _checked_steps(self) -> int:
        """The length of the run, which the trainer is given where a budget decides about it."""
        budget: Budget = self._get(self.config_init, "budget")
        architectures, seq_len = self.growth.architectures(self.model.initial_architecture), self.datamodule.seq_len
        if budget.mode in ("tokens", "flops", "own_chinchilla"):
            cost = run_cost(architectures, self.growth.stages, self._tokens_per_step, seq_len)
            self.trainer.fit_loop.epoch_loop.max_steps = budget.steps(self.trainer.max_steps, cost)
        budget.expect(self.growth, architectures, seq_len)
        max_steps = self.trainer.max_steps
        if max_steps < 1:
            raise InputError(f"trainer.max_steps={max_steps} gives the run no end; set trainer.max_steps to at least 1")
        self.model.schedule_config.check_total(max_steps)
        return max_steps

    def _check_recipe(self) -> list[ModelConfig]:
        """The architectures of all stages, each checked."""
        model, data = self.model, self.datamodule
        architectures = self.growth.check(
            model.initial_architecture, self.trainer.max_steps, self._tokens_per_step, model.applied_transitions
        )
        for architecture in architectures:
            if isinstance(self.trainer.strategy, ExpertParallelStrategy):
                self.trainer.strategy.layout_of(architecture)
            check_groups(architecture.moe, data.batch_size * data.seq_len)
        return architectures

    def _restore_shape(self, chosen: Path | None) -> dict[str, Any]:
        """Give the model the architecture of the checkpoint, and Lightning its path."""
        self.config_init[self.subcommand]["ckpt_path"] = None if chosen is None else str(chosen)
        if chosen is None:
            return {}
        store.verify(chosen)
        store.require_state(chosen)
        metadata = store.read_metadata(chosen)
        self.model.restore_shape(metadata)
        return metadata

    def _check_vocabulary(self) -> None:
        """The vocabulary is the data's; another one given to the model would be overridden without a word."""
        given, known = self.config[self.subcommand].get(VOCABULARY), self.datamodule.vocab_size
        if given not in (None, known):
            raise InputError(
                f"model.architecture.vocab_size={given} is not the {known} of the data's tokenizer, its source; "
                "leave it out"
            )

    def _check_data(self) -> None:
        """Make, open and check the data before anything is written: each process for itself, they have not met yet."""
        self._check_vocabulary()
        if self.datamodule.seq_len > self.model.architecture.max_seq_len:
            raise InputError(
                f"data.seq_len={self.datamodule.seq_len} is more than the model's "
                f"max_seq_len={self.model.architecture.max_seq_len}; lower data.seq_len or raise "
                "model.architecture.max_seq_len"
            )
        self.datamodule.prepare_data()
        self.datamodule.setup("fit" if self.subcommand == "fit" else "validate")

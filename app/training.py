"""`fit` and `validate`: LightningCLI with growmoe's parts, and every check that comes before a run writes anything."""

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from app import checkpoint as store
from app import checkpoint_folder
from app.checkpoint_io import DirectoryCheckpointIO
from app.launcher import follow_parent, parting
from app.outputs import check_new_output
from app.parsing import OneLineParser
from app.plan import PlannedStage, plan_stages
from app.resume import choose_checkpoint
from app.run_log import RunLog, write_history
from app.start import start_from
from app.strategies import ExpertParallelStrategy
from app.trainer import checked, trainer_in
from app.wandb_log import WandbSettings, start_wandb
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
from datamodules.text import TextDataModule
from modules.config import ModelConfig
from modules.dense import DenseLM  # noqa: F401
from modules.errors import InputError
from modules.files import replace_file
from modules.language_model import LanguageModel
from modules.mixture import MoELM  # noqa: F401
from modules.moe_config import check_groups
from modules.validation import validation_names
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


class _Parser(LightningArgumentParser, OneLineParser):
    """Lightning's parser, with errors of one line."""


class TrainingCLI(LightningCLI):
    """The verbs that train or validate.

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

    # -- fit -----------------------------------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Check everything that can be checked; only then touch the run directory."""
        run_dir = Path(self.trainer.default_root_dir)
        requested = self._get(self.config_init, "ckpt_path")
        chosen, damaged = choose_checkpoint(run_dir, requested, is_writer=self.trainer.is_global_zero)
        metadata = self._restore_shape(chosen)
        if chosen is None:
            self.take_start()
        max_steps = self._checked_steps()
        architectures = self._check_recipe()
        done = len(self.model.applied_transitions)
        self.model.architecture = self.model.architecture.trained_like(architectures[done])
        if metadata and metadata["step"] > max_steps:
            raise InputError(
                f"trainer.max_steps={max_steps} is below the checkpoint's step {metadata['step']}; raise it"
            )
        self._check_data()
        if metadata:
            self.datamodule.trainer = self.trainer
            self.datamodule.load_state_dict(metadata["data_position"])
        evaluation: LMEvaluation = self._get(self.config_init, "evaluation")
        evaluation.refuse_output()
        evaluation.prepare(self.datamodule, architectures)
        validated = validation_names(self.datamodule.languages)
        self._get(self.config_init, "monitor").check({*validated, *evaluation.metric_names}, evaluation.error_names)
        for path in damaged:
            sys.stderr.write(f"growmoe fit: checkpoint {path} is damaged and passed over\n")
        self._open_run(run_dir, chosen, metadata)

    def after_fit(self) -> None:
        """End as the signal that stopped the run demands."""
        number = self.stopper.received
        if number is not None:
            if self.trainer.is_global_zero:
                sys.stderr.write(f"growmoe fit: stopped by {signal.Signals(number).name} after a checkpoint\n")
            sys.exit(128 + number)

    # -- validate ------------------------------------------------------------------------------------------------------

    def before_validate(self) -> None:
        """Validation needs a checkpoint, and writes nothing."""
        requested = self._get(self.config_init, "ckpt_path")
        about: dict[str, Any] = {"checkpoint": requested or self.model.start_from}
        if requested is not None:
            metadata = self._restore_shape(self._named_checkpoint(requested))
            about |= {key: metadata[key] for key in ("step", "tokens")}
        elif not self.take_start():
            raise InputError(
                "validate without --ckpt_path would measure random weights; give a checkpoint directory or auto, or "
                "--model.start_from an imported model"
            )
        self._check_data()
        evaluation: LMEvaluation = self._get(self.config_init, "evaluation")
        evaluation.about = about
        if evaluation.output is not None:
            check_new_output(evaluation.output)
        if evaluation.suite is not None:
            evaluation.prepare(self.datamodule, [self.model.architecture], is_asked=True)

    def after_validate(self) -> None:
        """Print what was measured."""
        number = self.stopper.received
        if number is not None:
            sys.exit(128 + number)
        metrics = {name: float(value) for name, value in sorted(self.trainer.callback_metrics.items())}
        if self.trainer.is_global_zero:
            sys.stdout.write("".join(f"{name} {value:.4f}\n" for name, value in metrics.items()))
        if self._get(self.config_init, "evaluation").failures:
            sys.exit(1)

    # -- plan ----------------------------------------------------------------------------------------------------------

    def plan(self) -> list[PlannedStage]:
        """The stages that `fit` would go through, after all checks that need no data."""
        requested = self._get(self.config_init, "ckpt_path")
        if requested is not None:
            self._restore_shape(self._named_checkpoint(requested))
        else:
            self.take_start()
        max_steps = self._checked_steps()
        architectures = self._check_recipe()
        is_muon, seq_len = self.model.optimizer_config.kind == "muon", self.datamodule.seq_len
        return plan_stages(architectures, self.growth.stages, max_steps, self._tokens_per_step, seq_len, is_muon)

    def take_start(self) -> bool:
        """Take the model of `model.start_from`; whether there is one."""
        if self.model.start_from is None:
            return False
        start_from(Path(self.model.start_from), self.model, self.datamodule)
        return True

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _named_checkpoint(self, requested: str) -> Path:
        """The checkpoint that `--ckpt_path` names, where nothing will be written beside it."""
        folder = Path(self.trainer.default_root_dir) / "checkpoints"
        chosen = checkpoint_folder.newest_valid(folder)[0] if requested == "auto" else Path(requested)
        if chosen is None:
            raise InputError(f"--ckpt_path auto finds no valid checkpoint in {folder}; give a checkpoint directory")
        return chosen

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

    def _open_run(self, run_dir: Path, chosen: Path | None, metadata: dict[str, Any]) -> None:
        """Write the resolved configuration, take the logs back to the checkpoint, and start the loggers."""
        parser, config = self._parser(self.subcommand), self.config[self.subcommand]
        text = parser.dump(config, skip_none=False, skip_link_targets=False)
        run_log = RunLog(run_dir)
        if self.trainer.is_global_zero:
            run_dir.mkdir(parents=True, exist_ok=True)
            replace_file(run_dir / "config.yaml", text.encode())
            if chosen is not None:
                run_log.resume_at(metadata["step"], metadata["stage"])
                write_history(run_dir / "transitions.jsonl", metadata["transition_records"])
                if chosen.parent.resolve() == (run_dir / "checkpoints").resolve():
                    checkpoint_folder.supersede_later(chosen)
                    checkpoint_folder.remove_unfinished(chosen.parent)
        wandb_log = None
        if self.trainer.is_global_zero:
            settings = self._get(self.config_init, "wandb")
            wandb_log = start_wandb(settings, run_dir, metadata.get("wandb_id"), yaml.safe_load(text))
        given = self.extra_loggers if isinstance(self.extra_loggers, list) else [self.extra_loggers]
        loggers = [run_log, wandb_log, *given]
        self.trainer.loggers = [logger for logger in loggers if isinstance(logger, pl.loggers.Logger)]
        self.checkpoint_io.record = {"config": text, "wandb_id": wandb_log.version if wandb_log else None}


def run(arguments: Sequence[str], cli: type[TrainingCLI] = TrainingCLI) -> None:
    """Parse `fit ...` or `validate ...` and do it."""
    follow_parent()
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    sys.argv = [sys.argv[0], *arguments]
    with parting():
        cli(
            LanguageModel,
            TextDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=_Parser,
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "growmoe"},
            seed_everything_default=42,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

"""`fit` and `validate`: LightningCLI with growmoe's parts, and what comes before a run writes anything."""

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import set_parsing_settings

from app import checkpoint_folder
from app.configuration import ConfiguredCLI, RunParser
from app.launcher import follow_parent, parting
from app.outputs import check_new_output
from app.plan import PlannedStage, plan_stages
from app.resume import choose_checkpoint
from app.run_log import RunLog, write_history
from app.wandb_log import start_wandb
from callbacks.lm_evaluation import LMEvaluation
from datamodules.text import TextDataModule
from modules.errors import InputError
from modules.files import replace_file
from modules.language_model import LanguageModel
from modules.validation import validation_names


class TrainingCLI(ConfiguredCLI):
    """The verbs that train or validate."""

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

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _named_checkpoint(self, requested: str) -> Path:
        """The checkpoint that `--ckpt_path` names, where nothing will be written beside it."""
        folder = Path(self.trainer.default_root_dir) / "checkpoints"
        chosen = checkpoint_folder.newest_valid(folder)[0] if requested == "auto" else Path(requested)
        if chosen is None:
            raise InputError(f"--ckpt_path auto finds no valid checkpoint in {folder}; give a checkpoint directory")
        return chosen

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
            parser_class=RunParser,
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "growmoe"},
            seed_everything_default=42,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

"""Transitions inside a run: between two optimizer steps the network is exchanged for a grown one."""

import gc
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from callbacks.cadence import observers, starts_step, tokens_seen
from modules.config import ModelConfig
from modules.errors import InputError
from modules.growth.stage import GrowthStage, Plateau
from modules.growth.transition import (
    Grown,
    apply_stage,
    check_drift,
    describe_transition,
    network_source,
    target_config,
)
from modules.jsonl import append_jsonl
from modules.language_model import LanguageModel
from modules.layers.transformer import Transformer
from modules.optim import continue_scheduler

LOG_FILE = "transitions.jsonl"


class TransitionObserver(Protocol):
    """A callback that is told of transitions; both methods are optional."""

    def before_transition(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None: ...

    def on_transition(self, trainer: pl.Trainer, pl_module: LanguageModel, record: dict[str, Any]) -> None: ...


class Growth(pl.Callback):
    """Grows the model when a stage of the recipe is due, and carries optimizer and schedule through.

    Args:
        stages: the recipe, in order; empty: the model stays as it is.

    Attributes:
        is_logged: transitions are written down in the run directory.
    """

    def __init__(self, stages: list[GrowthStage] | None = None) -> None:
        self.stages = list(stages or [])
        self.is_logged = True
        self._progress = _Progress()

    def check(
        self, architecture: ModelConfig, max_steps: int, tokens_per_step: int, applied: list[str]
    ) -> list[ModelConfig]:
        """Check the whole recipe before anything is written: every target, the order of triggers, what was applied.

        Returns:
            The architectures that the run goes through, the first one included.

        Raises:
            InputError: naming the stage.
        """
        architectures = self.architectures(architecture)
        due = [stage.due_step(tokens_per_step, max_steps) for stage in self.stages]
        for number, (stage, step) in enumerate(zip(self.stages, due, strict=True), start=1):
            if step is not None and step >= max_steps:
                raise InputError(
                    f"growth stage {number}: {stage.trigger} (step {step}) is not below trainer.max_steps={max_steps}; "
                    "move the stage or train longer"
                )
        steps = [step for step in due if step is not None]
        if steps != sorted(set(steps)):
            raise InputError(
                f"growth stages are due at the steps {steps}; stages must come in order, each later than the last"
            )
        planned = [stage.identity for stage in self.stages[: len(applied)]]
        if planned != applied:
            raise InputError(
                f"the checkpoint has gone through the transitions {applied}, and the recipe begins with {planned}; "
                "resume with the recipe of that run (stages to come may be changed)"
            )
        return architectures

    def architectures(self, architecture: ModelConfig) -> list[ModelConfig]:
        """What a model goes through, itself included; raises `InputError`, naming the stage."""
        found = [architecture]
        for number, stage in enumerate(self.stages, start=1):
            if stage.trigger is None:
                raise InputError(
                    f"growth stage {number} does not say when it is due; give at_step, at_tokens, at_fraction or "
                    "at_plateau"
                )
            try:
                found.append(target_config(found[-1], stage))
            except InputError as error:
                raise InputError(f"growth stage {number}: {error}") from None
        return found

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: LanguageModel, batch: Any, batch_idx: int) -> None:
        """Apply the stages that are due; the batch at hand is then the new network's first."""
        if not starts_step(trainer, batch_idx):
            return
        while pl_module.stage < len(self.stages) and self._is_due(self.stages[pl_module.stage], trainer, pl_module):
            self._apply(self.stages[pl_module.stage], trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """A checkpoint is saved before its step's validation: a run that waits for a plateau makes up for it."""
        loop, every = trainer.fit_loop.epoch_loop, trainer.val_check_batch
        due = every is not None and (loop.total_batch_idx + 1) % every == 0
        missed = due and trainer.global_step > self._progress.step
        if missed and self._plateau(pl_module) is not None:
            trainer.validating = True
            loop.val_loop.run()
            trainer.training = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Watch the validation loss for a stage that waits for its plateau."""
        plateau = self._plateau(pl_module)
        if plateau is not None and not trainer.sanity_checking:
            loss = trainer.callback_metrics["val/loss"].item()
            self._progress.see(loss, plateau, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """What has been seen of the validation loss since the last transition."""
        return asdict(self._progress)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on watching where the checkpoint was."""
        self._progress = _Progress(**state_dict)

    def _plateau(self, pl_module: LanguageModel) -> Plateau | None:
        return self.stages[pl_module.stage].at_plateau if pl_module.stage < len(self.stages) else None

    def _is_due(self, stage: GrowthStage, trainer: pl.Trainer, pl_module: LanguageModel) -> bool:
        if stage.at_plateau is not None:
            return self._progress.without >= stage.at_plateau.patience
        if stage.at_tokens is not None:
            return tokens_seen(trainer) >= stage.at_tokens
        pace, step = pl_module.pace, trainer.global_step
        due = stage.due_step(1, pace.total)
        return due is not None and (pace.at(step) if stage.at_fraction is not None else step) >= due

    def _apply(self, stage: GrowthStage, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        for observer in observers(trainer, "before_transition"):
            observer.before_transition(trainer, pl_module)
        started = time.perf_counter()
        record = exchange_network(stage, trainer, pl_module)
        gc.collect()  # the former network holds itself by its hooks
        self._progress = _Progress(step=trainer.global_step)
        record = {
            "step": trainer.global_step,
            "tokens": tokens_seen(trainer),
            **record,
            "seconds": round(time.perf_counter() - started, 3),
            "stage": pl_module.stage,
        }
        pl_module.transition_records.append(record)
        if trainer.is_global_zero and self.is_logged:
            append_jsonl(Path(trainer.default_root_dir) / LOG_FILE, record)
        for observer in observers(trainer, "on_transition"):
            observer.on_transition(trainer, pl_module, record)


@dataclass
class _Progress:
    """The best validation loss, how many validations have passed since without progress, and the step of the last."""

    best: float = math.inf
    without: int = 0
    step: int = 0

    def see(self, loss: float, plateau: Plateau, step: int) -> None:
        """Count one validation."""
        self.step = step
        progressed = loss < self.best - plateau.min_delta
        self.without = 0 if progressed else self.without + 1
        self.best = min(self.best, loss) if progressed else self.best


def exchange_network(stage: GrowthStage, trainer: pl.Trainer, pl_module: LanguageModel) -> dict[str, Any]:
    """Grow the module's network by one stage: weights, optimizer state, learning rates and schedule.

    Returns:
        The record of `transitions.jsonl`, without what only the caller knows.

    Raises:
        RuntimeError: an exact method changed the logits of the held batch by more than rounding.
    """
    old = pl_module.network
    assert old is not None
    held = trainer.strategy.batch_to_device(trainer.datamodule.held_batch())
    before = _Probe(pl_module, held)
    world = pl_module.world
    world.settle(old)
    old.zero_grad(set_to_none=True)
    source = network_source(old, _named_optimizer_state(trainer, old), pl_module.factors, world)
    grown = apply_stage(source, stage, pl_module.device, world)
    pl_module.set_network(grown.network, grown.factors, stage.identity)
    _exchange_optimizer(trainer, grown)
    after = _Probe(pl_module, held)
    drift = before.drift(after)
    dtype = world.product_dtype(grown.network.embedding.weight.dtype)
    check_drift(grown.transition, drift, before.largest, dtype)
    measured = {
        "loss_before": before.loss,
        "loss_after": after.loss,
        "bpb_before": before.bits_per_byte(trainer.datamodule.languages),
        "bpb_after": after.bits_per_byte(trainer.datamodule.languages),
    }
    return describe_transition(old.config, grown.transition, stage, drift) | measured


class _Probe:
    """Loss and final hidden states of the held batch under the present network, in the precision of its weights.

    The network is asked as in decoding where it can decode: a capacity would make a token's output depend on others.
    """

    @torch.no_grad()
    def __init__(self, pl_module: LanguageModel, held: dict[str, Tensor]) -> None:
        network = pl_module.network
        assert network is not None
        self.network: Transformer = network.eval()
        hidden_BLD, _ = network(
            held["tokens"][:, :-1],
            position_ids_BL=held.get("position_ids"),
            document_ids_BL=held.get("document_ids"),
            decoding=not network.config.looks_ahead,
        )
        network.train(pl_module.training)
        self.hidden_TD = hidden_BLD.flatten(0, 1)
        targets_T = held["tokens"][:, 1:].flatten()
        total, losses_T = network.cross_entropy(self.hidden_TD, targets_T, pl_module.loss_chunk_rows)
        self.loss = (total / len(targets_T)).item()
        self._nats_B = losses_T.view(len(held["tokens"]), -1).sum(dim=1)
        self._held = held
        self.largest = max(logits.abs().max().item() for logits in self._logits())

    @torch.no_grad()
    def drift(self, other: "_Probe") -> float:
        """The largest difference of a logit; NaN counts as infinite."""
        pairs = zip(self._logits(), other._logits(), strict=True)
        largest = max((first - second).abs().max().item() for first, second in pairs)
        return largest if largest == largest else float("inf")

    def bits_per_byte(self, languages: list[str]) -> dict[str, float]:
        """Of the held samples of each language."""
        found = {}
        for number, language in enumerate(languages):
            is_its_B = self._held["language"] == number
            num_bytes = max(1, self._held["target_bytes"][is_its_B].sum().item())
            found[language] = self._nats_B[is_its_B].sum().item() / math.log(2) / num_bytes
        return found

    def _logits(self) -> Iterator[Tensor]:
        for rows in self.hidden_TD.split(1024):
            yield self.network.logits(rows)


def _named_optimizer_state(trainer: pl.Trainer, network: Transformer) -> dict[str, dict[str, Tensor]]:
    state = trainer.optimizers[0].state
    return {name: state[parameter] for name, parameter in network.named_parameters() if parameter in state}


def _exchange_optimizer(trainer: pl.Trainer, grown: Grown) -> None:
    """New optimizer and schedule through Lightning, then the carried state and the position in the schedule."""
    trainer.strategy.setup_optimizers(trainer)
    trainer.strategy.setup_precision_plugin()
    optimizer = trainer.optimizers[0]
    for name, parameter in grown.network.named_parameters():
        if name in grown.state:
            optimizer.state[parameter] = grown.state[name]
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert isinstance(scheduler, LambdaLR)
    continue_scheduler(scheduler, trainer.global_step)

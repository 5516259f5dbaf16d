"""The LightningModule around one exchangeable network: losses, optimizer, and what is logged of them.

Letters: B batch, L sequence, T tokens (B·L), D model.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from modules.config import CHECKPOINT_KEY, ModelConfig, describe_differences
from modules.errors import InputError
from modules.functional.flops import count_parameters
from modules.functional.routing import RoutingStats
from modules.functional.schedule import Pace, ScheduleConfig, learning_rate_factor
from modules.layers.transformer import Transformer
from modules.optim import (
    OptimizerConfig,
    ParameterFactors,
    apply_settings,
    build_optimizer,
    build_scheduler,
    clip_gradients,
    continue_scheduler,
    factor_record,
)
from modules.routing_balance import RoutingBalance
from modules.validation import Validation
from modules.weights import Weights
from modules.world import ONE_PROCESS, World, fill, world_of


class LanguageModel(pl.LightningModule):
    """A decoder in training. `network` can be exchanged between two steps; everything here works for each one.

    Args:
        architecture: the model that the run starts with; its vocabulary size comes from the data.
        optimizer: AdamW or Muon, and its settings.
        schedule: how the learning rate moves; it ends at `trainer.max_steps`.
        loss_chunk_rows: token rows whose vocabulary logits exist at one time.
        start_from: the directory of a checkpoint whose model the run starts with, in the place of fresh weights: an
            imported one, a grown one, or another run's. The architecture is then the checkpoint's: leave it out.
    """

    def __init__(
        self,
        architecture: ModelConfig,
        optimizer: OptimizerConfig = OptimizerConfig(),
        schedule: ScheduleConfig = ScheduleConfig(),
        loss_chunk_rows: int = 1024,
        start_from: str | None = None,
    ) -> None:
        super().__init__()
        if loss_chunk_rows < 1:
            raise InputError(f"loss_chunk_rows={loss_chunk_rows} must be at least 1; 1024 is usual")
        self.start_from = start_from
        if start_from is None:
            self.check_start(architecture)
        self.initial_architecture = architecture
        self.architecture = architecture
        self.stage = 0
        self.applied_transitions: list[str] = []
        self.transition_records: list[dict[str, Any]] = []
        self.optimizer_config = optimizer
        self.schedule_config = schedule
        self.loss_chunk_rows = loss_chunk_rows
        self.factors: dict[str, ParameterFactors] = {}
        self.grad_norm = torch.zeros(())
        self.origin: dict[str, Any] | None = None
        self.network: Transformer | None = None
        self._start_weights: Weights | None = None
        self.validation = Validation([])
        self._pace: Pace | None = None
        self._balance = RoutingBalance()

    @staticmethod
    def check_start(architecture: ModelConfig) -> None:
        """Raise `InputError` when a run of this class cannot start from the architecture; a subclass says which."""

    # -- the network and its exchange ----------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the network of the current architecture: the initial one, or that of the checkpoint being resumed."""
        if self.network is not None:
            return
        with torch.device("meta"):
            self.network = Transformer(self.architecture)
        self.world.place(self.network, self._memory_device)
        if self._start_weights is not None:
            fill(self.world, self.network, self._start_weights.items())
        elif getattr(self._trainer, "ckpt_path", None) is None:  # else all of it comes from a checkpoint
            fill(self.world, self.network, self.network.initial_values())
        self._start_weights = None

    @property
    def world(self) -> World:
        """The processes that train together."""
        return world_of(self._trainer)

    def begin_with(self, record: Mapping[str, Any], weights: Weights) -> None:
        """Start with the model of another checkpoint: its record, and its weights, which are read when they are needed.

        Raises:
            InputError: the configuration's architecture is another one, or not what this class starts from.
        """
        self.initial_architecture = self._adopted(ModelConfig.from_dict(record["architecture"]))
        self.check_start(self.initial_architecture)
        self.architecture = self.initial_architecture
        self.origin = record.get("origin")
        self._start_weights = weights

    def set_network(self, network: Transformer, factors: Mapping[str, ParameterFactors], transition_id: str) -> None:
        """Put a grown network in the place of the present one; the optimizer must be set up anew afterwards."""
        network.train(self.training)
        self.network = network
        self.architecture = network.config
        self.factors = dict(factors)
        self.applied_transitions.append(transition_id)
        self.stage = len(self.applied_transitions)

    def restore_shape(self, record: Mapping[str, Any]) -> None:
        """Take architecture, stage and factors from a checkpoint's record, before the network is built.

        Settings of the routing losses are those of the configuration, also where they have changed.

        Raises:
            InputError: the checkpoint belongs to a run that started from another architecture, or trains with another
                optimizer.
        """
        saved = ModelConfig.from_dict(record["initial_architecture"])
        if self.start_from is not None:
            self.initial_architecture = self._adopted(saved)
        differences = describe_differences(saved, self.initial_architecture)
        if differences:
            raise InputError(
                f"the checkpoint's run started from another architecture: {differences} (checkpoint against "
                "configuration); resume with the configuration of that run, or start a new run without --ckpt_path"
            )
        kind = record["optimizer"].get("kind", "adamw")
        if kind != self.optimizer_config.kind:
            raise InputError(
                f"model.optimizer.kind={self.optimizer_config.kind} cannot go on with the state of the checkpoint's "
                f"run, which trains with {kind}; resume with model.optimizer.kind={kind}, or start a new run from its "
                "model with --model.start_from"
            )
        architecture = ModelConfig.from_dict(record["architecture"])
        self.architecture = architecture.trained_like(self.initial_architecture)
        self.stage = record["stage"]
        self.applied_transitions = list(record["applied_transitions"])
        self.transition_records = list(record["transition_records"])
        self.factors = {name: ParameterFactors(*values) for name, values in record["factors"].items()}
        self.origin = record.get("origin")

    def _adopted(self, saved: ModelConfig) -> ModelConfig:
        """The architecture to start from, with the configuration's training settings where it gives an architecture."""
        given = replace(self.initial_architecture, vocab_size=saved.vocab_size)  # that one is the data's
        if given == ModelConfig(saved.vocab_size):
            return saved
        differences = describe_differences(saved, given)
        if differences:
            raise InputError(
                f"model.start_from={self.start_from} has another architecture than the configuration: {differences} "
                "(checkpoint against configuration); leave model.architecture out"
            )
        return saved.trained_like(given)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record what `restore_shape` needs; plain JSON types only."""
        checkpoint[CHECKPOINT_KEY] = {
            "module": type(self).__name__,
            "initial_architecture": self.initial_architecture.to_dict(),
            "architecture": self.architecture.to_dict(),
            "stage": self.stage,
            "applied_transitions": list(self.applied_transitions),
            "transition_records": list(self.transition_records),
            "factors": factor_record(self.factors),
            "optimizer": asdict(self.optimizer_config),
            "schedule": asdict(self.schedule_config),
            "total_steps": self.pace.total,
            **({} if self.origin is None else {"origin": self.origin}),
        }

    @property
    def learning_rate(self) -> float:
        """The schedule's learning rate for the next update; grown parameters have factors on it."""
        return self.optimizer_config.lr * self._rate_factor(self.trainer.global_step)

    @property
    def pace(self) -> Pace:
        """How the run goes through its schedule."""
        return self._pace or Pace(self.trainer.max_steps)

    def set_pace(self, pace: Pace) -> None:
        """Go on so that the run ends elsewhere than was planned; the learning rate follows at once."""
        self._pace = pace
        self.trainer.fit_loop.epoch_loop.max_steps = pace.last_step
        for config in self.trainer.lr_scheduler_configs:
            assert isinstance(config.scheduler, LambdaLR)
            continue_scheduler(config.scheduler, self.trainer.global_step)

    def _rate_factor(self, finished_steps: int) -> float:
        return learning_rate_factor(finished_steps, self.pace, self.schedule_config)

    # -- training ------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer of the present network, and the schedule over the run's steps."""
        self.schedule_config.check_total(self.pace.total)
        optimizer = build_optimizer(self._net, self.optimizer_config, self.factors, self.world)
        scheduler = build_scheduler(optimizer, lambda step: self._rate_factor(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """A resumed run follows the optimizer settings of its configuration, also where they have changed."""
        scheduler = self.trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(scheduler, LambdaLR)
        wanted = build_optimizer(self._net, self.optimizer_config, self.factors, self.world)
        apply_settings(self.trainer.optimizers[0], scheduler, wanted)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Language-model loss plus the weighted routing losses; the parts are returned for those who watch.

        Of several processes each has its share of the losses of all: their sum is the loss of one with all samples.
        """
        total, losses_BL, stats = self.token_losses(batch)
        share = self.world.share(losses_BL.numel(), total)
        lm_loss = total / losses_BL.numel() * share
        outputs: dict[str, Tensor] = {"losses_BL": losses_BL}
        loss = lm_loss
        if stats:
            assert self.architecture.moe is not None
            auxiliary_loss, watched = self._balance.losses(self.architecture.moe, stats, self.world, share)
            loss = loss + auxiliary_loss
            outputs |= watched
        return outputs | {"loss": loss, "lm_loss": lm_loss.detach()}

    def token_losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[RoutingStats]]:
        """Sum of the batch's token losses in nats, the losses [B, L] (detached), and the routing stats."""
        inputs_BL, targets_BL = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        hidden_BLD, stats = self._net(
            inputs_BL, position_ids_BL=batch.get("position_ids"), document_ids_BL=batch.get("document_ids")
        )
        total, losses_T = self._net.cross_entropy(hidden_BLD.flatten(0, 1), targets_BL.flatten(), self.loss_chunk_rows)
        return total, losses_T.view_as(targets_BL), stats

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step; then move the selection biases towards an even load, and begin to count the next step's choices."""
        super().optimizer_step(*args, **kwargs)
        self._balance.end_step(self.architecture.moe, self._net.routed_layers(), self.world)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm, and keep the norm for whoever watches.

        Raises:
            FloatingPointError: the norm is not finite; the parameters are still those of the step before.
        """
        self.grad_norm = clip_gradients(self._net.parameters(), gradient_clip_val, self.world)
        if not torch.isfinite(self.grad_norm):
            raise FloatingPointError(
                f"the gradient norm is {self.grad_norm.item()} after {self.trainer.global_step} finished steps; the "
                "last checkpoint is sound: resume from it with a lower learning rate or another data seed"
            )

    # -- validation ----------------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Meters for each language."""
        self.validation = Validation(self.trainer.datamodule.languages, self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add one batch of one language (one loader each)."""
        total, losses_BL, stats = self.token_losses(batch)
        self.validation.add(dataloader_idx, total, losses_BL.numel(), batch["target_bytes"].sum(), stats)

    def on_validation_epoch_end(self) -> None:
        """Log the losses of each language, and of all tokens together."""
        metrics = self.validation.metrics()
        self.log_dict(metrics, logger=False)
        if not self.trainer.sanity_checking:
            log_metrics(self.trainer, metrics)

    @property
    def _memory_device(self) -> torch.device:
        """Where a network gets its memory; one process first makes it on the CPU."""
        return torch.device("cpu") if self.world is ONE_PROCESS else self.trainer.strategy.root_device

    @property
    def _net(self) -> Transformer:
        assert self.network is not None, "configure_model has not run"
        return self.network


def log_metrics(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Send metrics to every logger at the number of finished optimizer steps."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)


def growth_metrics(module: LanguageModel) -> dict[str, float]:
    """Stage and sizes of the present network."""
    count = count_parameters(module.architecture)
    return {
        "growth/stage": module.stage,
        "growth/params_total": count.total,
        "growth/params_active": count.active,
    }

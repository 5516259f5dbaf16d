"""Lightning's trainer: which of its options are refused, and which strategy trains several processes."""

import os
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import DoublePrecision

from app.strategies import ExpertParallelStrategy
from modules.errors import InputError

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "gradient_clip_algorithm": ((None, "norm"), "gradients are clipped by their global norm"),
    "limit_train_batches": ((None, 1.0), "the length of a run is trainer.max_steps"),
    "overfit_batches": ((0.0,), "data.seed and trainer.max_steps decide what is seen"),
    "enable_checkpointing": ((None, True), "a run must be able to resume (see checkpoint.every_n_steps)"),
    "fast_dev_run": ((False, 0), "a short run is trainer.max_steps"),
    "use_distributed_sampler": ((False,), "the data modules share samples out themselves"),
}
"""Options with the values that are allowed, and why others are not: they break the order of the data, or do nothing."""


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration; raises `InputError` for what is not offered."""
    if given["precision"] in ("16-true", "16-mixed", "16", "transformer-engine-float16"):
        raise InputError(
            f"trainer.precision={given['precision']} has float16, in which small gradients vanish and weights lose "
            "most updates; use bf16-mixed, or 32-true on a device without bfloat16"
        )
    for name, (allowed, reason) in REFUSED.items():
        if given[name] not in allowed:
            raise InputError(f"trainer.{name}={given[name]} is not offered, since {reason}; leave it out")
    if given["log_every_n_steps"] < 1:
        raise InputError(f"trainer.log_every_n_steps={given['log_every_n_steps']} must be at least 1")
    return dict(given)


def trainer_in(settings: dict[str, Any]) -> pl.Trainer:
    """The trainer; several processes get a strategy that trains them as one.

    Raises:
        InputError: a strategy of Lightning's for several processes, which averages gradients and keeps models from
            growing; a layout that does not fit the number of processes.
    """
    if settings["strategy"] == "auto" and _num_processes(settings) > 1:
        settings["strategy"] = ExpertParallelStrategy()
    if isinstance(settings["strategy"], ExpertParallelStrategy) and settings["precision"] in ("64", "64-true"):
        settings["precision"] = None  # Lightning refuses it by the strategy's base class, and takes the plugin
        settings["plugins"].append(DoublePrecision())
    trainer = pl.Trainer(**settings)
    if isinstance(trainer.strategy, ExpertParallelStrategy):
        trainer.strategy.check()
    elif trainer.world_size > 1:
        name = type(trainer.strategy).__name__
        raise InputError(
            f"trainer.strategy={name} does not train {trainer.world_size} processes as one; leave it out for "
            "ExpertParallelStrategy, whose dp_replicate, dp_shard, ep and tp say who holds what"
        )
    return trainer


def _num_processes(settings: Mapping[str, Any]) -> int:
    """Of the whole run: those of the launcher, or those that Lightning is going to start."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    devices = settings["devices"]
    if devices in ("auto", -1, "-1"):
        devices = torch.cuda.device_count() if settings["accelerator"] in ("auto", "gpu", "cuda") else 1
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    return max(1, count) * settings["num_nodes"]

"""Weights & Biases: a mirror of the run's metrics that can never end the run."""

import importlib.util
import netrc
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger

START_TIMEOUT_S = 10
"""Seconds that an unreachable server may hold up the start."""


@dataclass(frozen=True)
class WandbSettings:
    """Weights & Biases. Metrics are complete in `metrics.csv` without it."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online when there is a key (WANDB_API_KEY or a netrc entry), offline otherwise"""
    project: str = "growmoe"
    """the project that the run is listed in"""
    name: str | None = None
    """the run's name; empty: the name of the run directory"""


def start_wandb(settings: WandbSettings, run_dir: Path, run_id: str | None, config: dict[str, Any]) -> Logger | None:
    """Start (or continue, with `run_id`) the W&B run; falls back to offline, and to none with a warning."""
    if settings.mode == "disabled":
        return None
    if importlib.util.find_spec("wandb") is None:
        warnings.warn("wandb is not installed, so the run is not mirrored to Weights & Biases", stacklevel=2)
        return None
    offline = settings.mode == "offline" or (settings.mode == "auto" and not _has_key())
    try:
        return _start(settings, run_dir, run_id, config, offline)
    except Exception as error:  # whatever goes wrong here must not end training
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if offline:
            warnings.warn(f"Weights & Biases did not start, the run goes on without it: {reason}", stacklevel=2)
            return None
        warnings.warn(f"Weights & Biases cannot be reached, the run is logged offline: {reason}", stacklevel=2)
        return start_wandb(replace(settings, mode="offline"), run_dir, run_id, config)


def _start(settings: WandbSettings, run_dir: Path, run_id: str | None, config: dict[str, Any], offline: bool) -> Logger:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    run_dir.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=settings.project,
        name=settings.name or run_dir.resolve().name,
        dir=run_dir,
        id=run_id,
        resume="allow" if run_id else None,
        mode="offline" if offline else "online",
        config=config,
        settings=wandb.Settings(init_timeout=START_TIMEOUT_S, silent=True, disable_git=True, console="off"),
    )
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return WandbLogger(experiment=run)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False

"""Weights & Biases: a mirror of the run's metrics that can never end the run."""

import importlib.util
import io
import netrc
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

START_TIMEOUT_S = 10
"""Seconds that an unreachable server may hold up the start."""
LOAD_PICTURE = "moe/final_load"
"""Name of the heat map of experts that ends a run."""


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
    return Mirror(run, run_dir)


class Mirror(WandbLogger):
    """Lightning's logger, which ends a run with the picture of its experts' load, where it had experts."""

    def __init__(self, run: Any, run_dir: Path) -> None:
        super().__init__(experiment=run)
        self._run_dir = run_dir

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Draw from the logs of the run directory; what goes wrong there is a warning."""
        super().finalize(status)
        if status != "success":
            return
        try:
            self._log_load()
        except Exception as error:
            message = f"the picture of the experts' load was not logged to Weights & Biases: {error}"
            warnings.warn(message, stacklevel=2)

    def _log_load(self) -> None:
        from PIL import Image

        from app.report.data import load_run
        from app.report.drawing import drawing_style, png_bytes
        from app.report.heatmaps import final_map
        from app.report.load import read_load

        final = read_load(load_run(self._run_dir)).final()
        if final is None:
            return
        with drawing_style():
            picture = Image.open(io.BytesIO(png_bytes(final_map(final))))
        self.log_image(LOAD_PICTURE, [picture], step=final.last_step, caption=[final.summary()])


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False

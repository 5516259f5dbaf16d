"""How evenly the routers use their experts, and a warning when they stop to.

Letters: N routed layers, E experts, K experts per token, W logged steps.
"""

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from callbacks.cadence import finished_step, is_log_step, tokens_seen
from callbacks.warning import warn
from modules.errors import InputError, require_not_negative
from modules.jsonl import append_jsonl
from modules.language_model import LanguageModel, log_metrics
from modules.moe_config import MoEConfig
from modules.routing_metrics import LOAD_FIGURES, RoutingLoad, load_figures

LOG_FILE = "expert_load.jsonl"
LANGUAGE_FILE = "language_load.jsonl"
NAMED_LAYERS = 6
"""further layers that a warning names"""
_OVERALL = (*LOAD_FIGURES, "entropy", "logit_rms", "balance_loss", "z_loss")
_DROPPED = ("dropped_first", "dropped_second")


class ExpertLoad(pl.Callback):
    """Logs `moe/*` of the steps that are logged, each layer's shares to `expert_load.jsonl`, and warns on collapse.

    Figures of a step are over all its micro-batches and all ranks. `moe/dropped_first` and `moe/dropped_second` are
    logged of models with a capacity (the first alone, as the share of tokens that no expert took, where experts
    choose). Collapse is judged layer by layer, on counts summed over a window of logged steps; it is told once, and
    again only when more than a window has passed without it in between. After a transition the window begins anew.

    Args:
        per_layer_keys: routed layers whose own figures (`moe/layer_05/load_cv`, ...) are logged, evenly spaced over
            the depth; 0: none. `expert_load.jsonl` and the report have all of them.
        collapse_window: logged steps whose counts are summed up to judge collapse; 0: no warnings.
        warn_dead_fraction: warn when more than this share of a layer's experts got no token in the window.
        warn_max_over_ideal: warn when a layer's busiest expert got more than this many times an even share in the
            window; empty: half-way from 1 (even) to num_experts / top_k (every token visits that expert).
    """

    def __init__(
        self,
        per_layer_keys: int = 8,
        collapse_window: int = 20,
        warn_dead_fraction: float = 0.0,
        warn_max_over_ideal: float | None = None,
    ) -> None:
        require_not_negative(
            **{"expert_load.per_layer_keys": per_layer_keys, "expert_load.collapse_window": collapse_window}
        )
        if not 0 <= warn_dead_fraction <= 1:
            raise InputError(
                f"expert_load.warn_dead_fraction={warn_dead_fraction} is not a share from 0 to 1; use 0 to hear of "
                "any dead expert, 1 to hear of none"
            )
        if warn_max_over_ideal is not None and not warn_max_over_ideal >= 1:
            raise InputError(
                f"expert_load.warn_max_over_ideal={warn_max_over_ideal} is below 1, which an even load has; choose "
                "a number between 1 and num_experts / top_k, or leave it out"
            )
        self.per_layer_keys = per_layer_keys
        self.watch = CollapseWatch(collapse_window, warn_dead_fraction, warn_max_over_ideal)
        self.latest_metrics: dict[str, float] = {}
        self._step_load: RoutingLoad | None = None
        self._stage = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """A checkpoint that was grown outside a run brings the window of the network before."""
        if self._stage != pl_module.stage:
            self.watch.reset()
        self._stage = pl_module.stage

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up on the device; log at the steps that are logged. Every rank takes part, rank zero writes."""
        moe = pl_module.architecture.moe
        if moe is None or "tokens_per_expert_NE" not in outputs:
            return
        if self._step_load is None:
            num_layers, num_experts = outputs["tokens_per_expert_NE"].shape
            self._step_load = RoutingLoad(num_layers, num_experts, moe.top_k).to(pl_module.device)
        self._step_load.update(outputs, outputs["losses_BL"].numel())
        if is_log_step(trainer):
            self._log(trainer, pl_module, moe, self._step_load.compute())
        if finished_step(trainer):
            self._step_load.reset()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Note how each language uses the experts."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        choices = pl_module.validation.expert_choices()
        if choices and trainer.is_global_zero:
            layers = pl_module.architecture.routed_layers
            record = {
                "step": trainer.global_step,
                "tokens": tokens_seen(trainer),
                "languages": {language: _shares(layers, counts_NE) for language, counts_NE in choices.items()},
            }
            append_jsonl(Path(trainer.default_root_dir) / LANGUAGE_FILE, record)

    def on_transition(self, trainer: pl.Trainer, pl_module: LanguageModel, record: dict[str, Any]) -> None:
        """What was seen is of the network before."""
        self.latest_metrics = {}
        self._step_load = None
        self.watch.reset()
        self._stage = pl_module.stage

    def state_dict(self) -> dict[str, Any]:
        """The window and what has been told: a resumed run warns as the uninterrupted one."""
        return {"stage": self._stage, **self.watch.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the window of a checkpoint."""
        self._stage = state_dict["stage"]
        self.watch.load_state_dict(state_dict)

    def _log(self, trainer: pl.Trainer, pl_module: LanguageModel, moe: MoEConfig, figures: dict[str, Tensor]) -> None:
        layers = pl_module.architecture.routed_layers
        counts_NE = figures["tokens_per_expert_NE"].reshape(len(layers), -1).cpu()
        names = (*_OVERALL, *_dropped_names(moe))
        self.latest_metrics = {f"moe/{name}": figures[name].item() for name in names}
        for name in LOAD_FIGURES:
            values = figures[f"{name}_N"].reshape(-1).tolist()
            for n in spread(len(layers), self.per_layer_keys):
                self.latest_metrics[f"moe/layer_{layers[n]:02d}/{name}"] = values[n]
        log_metrics(trainer, self.latest_metrics)
        if trainer.is_global_zero:
            _write_shares(trainer, layers, counts_NE)
        for finding in self.watch.add(counts_NE, moe.top_k):
            steps = "" if self.watch.window == 1 else f"the {self.watch.window} logged steps up to "
            span = f"{steps}step {trainer.global_step}"
            warn(f"{finding.describe(layers, span)}; {remedy(finding, moe)}")


@dataclass(frozen=True)
class Finding:
    """Layers in which experts have newly collapsed in one way.

    Attributes:
        figure: which of `LOAD_FIGURES` is above its limit.
        values: the figure by layer (counted among routed layers), the worst layer first.
        num_experts, top_k: of these layers.
    """

    figure: str
    values: dict[int, float]
    limit: float
    num_experts: int
    top_k: int

    def describe(self, layers: tuple[int, ...], span: str) -> str:
        """What happened, how far it is from the limit, and where else."""
        (worst, value), *others = self.values.items()
        named = ", ".join(str(layers[n]) for n, _ in others[:NAMED_LAYERS])
        more = f" and {len(others) - NAMED_LAYERS} more" if len(others) > NAMED_LAYERS else ""
        also = f" (as in layer{'s' if len(others) > 1 else ''} {named}{more})" if others else ""
        if self.figure == "dead_fraction":
            return (
                f"layer {layers[worst]}: {round(value * self.num_experts)} of {self.num_experts} experts got no token "
                f"in {span}{also}: dead fraction {value:.3g}, limit expert_load.warn_dead_fraction={self.limit:g}"
            )
        return (
            f"layer {layers[worst]}: the busiest of {self.num_experts} experts got {value:.2f} times an even share in "
            f"{span}{also}, limit expert_load.warn_max_over_ideal={self.limit:.3g} (at "
            f"{self.num_experts / self.top_k:g} every token visits it)"
        )


class CollapseWatch:
    """Tells once when a layer's experts collapse: from counts that are summed over the last W logged steps.

    A collapse is over when the window was without it at more than W logged steps in a row: one stray token, which stays
    in the window for W steps, does not end it. Only then can it be told again. Counts are summed over ranks before they
    come here, so that every rank decides alike.
    """

    def __init__(self, window: int, warn_dead_fraction: float, warn_max_over_ideal: float | None) -> None:
        self.window = window
        self.warn_dead_fraction = warn_dead_fraction
        self.warn_max_over_ideal = warn_max_over_ideal
        self._counts: deque[Tensor] = deque(maxlen=window)
        self._calm: dict[str, dict[int, int]] = {}  # figure -> layer that was told of -> logged steps since it was bad

    def reset(self) -> None:
        """Forget everything."""
        self._counts.clear()
        self._calm.clear()

    def add(self, counts_NE: Tensor, top_k: int) -> list[Finding]:
        """Take in the counts of one logged step (on the host); returns what is newly wrong, once the window is full."""
        self._counts.append(counts_NE)
        if not self.window or len(self._counts) < self.window:
            return []
        figures = load_figures(torch.stack(tuple(self._counts)).sum(dim=0))
        num_experts = counts_NE.shape[1]
        half_way = (1 + num_experts / top_k) / 2
        limits = {
            "dead_fraction": self.warn_dead_fraction,
            "max_over_ideal": half_way if self.warn_max_over_ideal is None else self.warn_max_over_ideal,
        }
        found = {name: self._newly_above(name, figures[name].tolist(), limit) for name, limit in limits.items()}
        return [Finding(name, new, limits[name], num_experts, top_k) for name, new in found.items() if new]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types."""
        counts_WNE = torch.stack(tuple(self._counts)) if self._counts else None
        return {"counts_WNE": counts_WNE, "calm": {name: dict(layers) for name, layers in self._calm.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave; a shorter window than before keeps its newest steps."""
        self.reset()
        if state["counts_WNE"] is not None:
            self._counts.extend(state["counts_WNE"].cpu().unbind())
        self._calm = {name: dict(layers) for name, layers in state["calm"].items()}

    def _newly_above(self, name: str, values: list[float], limit: float) -> dict[int, float]:
        """Layers that are above the limit and have not been told of, worst first; counts the calm of the others."""
        calm = self._calm.setdefault(name, {})
        new = {n: value for n, value in enumerate(values) if value > limit and n not in calm}
        for n, value in enumerate(values):
            if value > limit:
                calm[n] = 0
            elif n in calm:
                calm[n] += 1
                if calm[n] > self.window:
                    del calm[n]
        return dict(sorted(new.items(), key=lambda item: -item[1]))


def remedy(finding: Finding, moe: MoEConfig) -> str:
    """What to do about a collapse under this configuration, in one clause."""
    rate, weight = moe.router.bias_update_rate, moe.balance_loss_weight
    steps = []
    if rate > 0:
        steps.append(f"raise moe.router.bias_update_rate={rate:g}")
    if weight > 0:
        steps.append(f"raise moe.balance_loss_weight={weight:g}")
    elif not rate:
        steps.append("set moe.balance_loss_weight (0.01 is usual; now 0)")
    if not rate and moe.router.kind == "top_k":
        steps.append("set moe.router.bias_update_rate (0.001 is usual; now 0)")
    if moe.capacity is not None and finding.figure == "max_over_ideal":
        steps.append(f"raise moe.capacity.factor={moe.capacity.factor:g} so that fewer choices are dropped")
    return ", ".join([*steps, "lower optimizer.lr or lengthen schedule.warmup_steps"])


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers below `count`, evenly spaced, first and last among them."""
    return sorted({round(n) for n in torch.linspace(0, count - 1, min(count, wanted), dtype=torch.float64).tolist()})


def _dropped_names(moe: MoEConfig) -> tuple[str, ...]:
    if moe.capacity is None:
        return ()
    return _DROPPED[:1] if moe.router.kind == "expert_choice" else _DROPPED[: moe.top_k]


def _write_shares(trainer: pl.Trainer, layers: tuple[int, ...], counts_NE: Tensor) -> None:
    """One line of the log."""
    record = {"step": trainer.global_step, "tokens": tokens_seen(trainer), "layers": _shares(layers, counts_NE)}
    append_jsonl(Path(trainer.default_root_dir) / LOG_FILE, record)


def _shares(layers: tuple[int, ...], counts_NE: Tensor) -> dict[str, list[float]]:
    """Each expert's share of a layer, with four digits, so that only an expert without a token has 0."""
    shares_NE = (counts_NE.double() / counts_NE.sum(dim=1, keepdim=True)).tolist()
    by_layer = zip(layers, shares_NE, strict=True)
    return {str(layer): [float(f"{share:.4g}") for share in row] for layer, row in by_layer}

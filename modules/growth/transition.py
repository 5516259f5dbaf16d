"""A transition: what a stage of a recipe changes, and the network and optimizer state on its other side.

The same code serves a transition inside a run and `growmoe grow` on a checkpoint.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modules.config import ModelConfig
from modules.errors import InputError
from modules.functional.flops import count_parameters
from modules.grown_adamw import BIRTHS
from modules.growth.depth import Deepen
from modules.growth.duplicate import Duplicate
from modules.growth.maps import widened_eps
from modules.growth.operation import Moments, Operation, ParameterSource, TensorSource
from modules.growth.stage import GrowthStage, GrowthTarget
from modules.growth.upcycle import Upcycle
from modules.growth.width import Widen
from modules.layers.transformer import Transformer
from modules.muon import MOMENTUM
from modules.optim import ParameterFactors
from modules.world import ONE_PROCESS, World, fill

DRIFT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.05}
"""What rounding may change of a logit in an exact transition, as a share of the largest logit (or of 1)."""


@dataclass(frozen=True)
class Transition:
    """What a stage makes of a model: parameters that are grown one by one as they are asked for, and how.

    Attributes:
        is_exact: whether the grown model computes the same function, up to rounding.
    """

    grown: ParameterSource
    kinds: list[str]
    methods: list[str]
    is_exact: bool

    @property
    def config(self) -> ModelConfig:
        """The architecture on the other side."""
        return self.grown.config


def build_transition(source: ParameterSource, stage: GrowthStage) -> Transition:
    """Chain the operations that a stage needs: widen, then deepen, then upcycle.

    Raises:
        InputError: the target is smaller than the source, cannot be reached, or changes nothing.
    """
    target, start = stage.target, source.config
    _check_not_smaller(start, target)
    steps: list[tuple[str, str, Operation]] = []
    grown: ParameterSource = source

    def add(kind: str, method: str, operation: Operation) -> Operation:
        steps.append((kind, method, operation))
        return operation

    wider = _wider_config(start, target)
    if wider != start:
        rules = stage.width_rules
        wider = replace(wider, norm_eps=widened_eps(start, wider.dim, rules.maps))
        grown = add("widen", rules.method, Widen(grown, wider, rules, stage.warm_up))
    if target.num_layers is not None and target.num_layers != start.num_layers:
        deeper = Deepen(grown, target.num_layers, stage.depth_method, stage.new_layers, stage.warm_up)
        grown = add("deepen", stage.depth_method, deeper)
    if target.moe is not None and target.moe != start.moe:
        scale_out = Upcycle if start.moe is None else Duplicate
        grown = add("upcycle", stage.upcycle_rules.variation, scale_out(grown, target.moe, stage.upcycle_rules))
    if not steps:
        raise InputError(f"growth stage {stage.trigger or ''} changes nothing; give it a larger target or remove it")
    kinds, methods, operations = zip(*steps, strict=True)
    return Transition(grown, list(kinds), list(methods), all(operation.is_exact for operation in operations))


def target_config(source: ModelConfig, stage: GrowthStage) -> ModelConfig:
    """The architecture after a stage, without touching weights; raises `InputError` as `build_transition` does."""
    nothing: Any = None  # an operation's shape is known before anything is read
    return build_transition(TensorSource(source, nothing, nothing, nothing), stage).config


@dataclass(frozen=True)
class Grown:
    """The other side of a transition: the network, its factors, and its optimizer state by name."""

    transition: Transition
    network: Transformer
    factors: dict[str, ParameterFactors]
    state: dict[str, dict[str, Any]]


def apply_stage(
    source: ParameterSource, stage: GrowthStage, device: torch.device | str, world: World = ONE_PROCESS
) -> Grown:
    """Grow by one stage: weights always, factors and optimizer state where they are mapped.

    Args:
        world: of several processes, all grow whole parameters, one at a time, and each keeps its part.
    """
    transition = build_transition(source, stage)
    network = materialize(transition.grown, device, world)
    return Grown(transition, network, *optimizer_parts(transition, stage, network, world))


def optimizer_parts(
    transition: Transition, stage: GrowthStage, network: nn.Module, world: World = ONE_PROCESS
) -> tuple[dict[str, ParameterFactors], dict[str, dict[str, Any]]]:
    """Factors and optimizer state of the grown network's parameters; none when the stage resets them.

    Args:
        network: names the parameters; it may be on the meta device.
    """
    if stage.optimizer_state == "reset":
        return {}, {}
    return grown_factors(transition.grown, network), grown_state(transition.grown, network, world)


def describe_transition(
    source: ModelConfig, transition: Transition, stage: GrowthStage, drift: float | None
) -> dict[str, Any]:
    """What is on record of a transition, wherever it happened: sizes, methods, and the largest change of a logit."""
    count = count_parameters(transition.config)
    kinds, methods = transition.kinds, transition.methods
    return {
        "kind": kinds[0] if len(kinds) == 1 else kinds,
        "method": methods[0] if len(methods) == 1 else methods,
        "source": source.to_dict(),
        "target": transition.config.to_dict(),
        "max_logit_drift": drift,
        "exact": transition.is_exact,
        "optimizer_state": stage.optimizer_state,
        "params_total": count.total,
        "params_active": count.active,
        "id": stage.identity,
    }


def check_drift(transition: Transition, drift: float, largest: float, dtype: torch.dtype) -> None:
    """Raise RuntimeError when methods that keep the function changed a logit by more than rounding.

    Args:
        drift: the largest change of a logit.
        largest: the largest logit before.
        dtype: in which blocks compute.
    """
    limit = DRIFT_TOLERANCE[dtype] * max(1.0, largest)
    if transition.is_exact and not drift <= limit:
        raise RuntimeError(
            f"{' + '.join(transition.methods)} changed a logit by {drift:.3g} and keeps the function up to "
            f"{limit:.3g}; nothing is trained or written with the grown model: this is a defect, please report it"
        )


def network_source(
    network: Transformer,
    state: Mapping[str, Mapping[str, Any]],
    factors: Mapping[str, ParameterFactors],
    world: World = ONE_PROCESS,
) -> TensorSource:
    """A network and its optimizer state (by parameter name) as the start of a chain."""
    weights = network.state_dict()  # parameters, and the buffers that checkpoints hold
    return tensor_source(network.config, lambda name: weights[name].detach(), state, factors, world)


def tensor_source(
    config: ModelConfig,
    read_weight: Callable[[str], Tensor],
    state: Mapping[str, Mapping[str, Any]],
    factors: Mapping[str, ParameterFactors],
    world: World = ONE_PROCESS,
) -> TensorSource:
    """Weights that are read by name, and optimizer state by parameter name, as the start of a chain."""

    def read_moments(name: str) -> Moments | None:
        if not state.get(name):
            return None
        saved = state[name]
        first, second = (MOMENTUM, None) if MOMENTUM in saved else ("exp_avg", "exp_avg_sq")
        moments = world.whole(saved[first]), None if second is None else world.whole(saved[second])
        return Moments(*moments, float(saved["step"]), tuple(saved.get(BIRTHS, ())))

    return TensorSource(
        config,
        read_weight=lambda name: world.whole(read_weight(name)),
        read_moments=read_moments,
        read_factors=lambda name: factors.get(name, ParameterFactors()),
    )


@torch.no_grad()
def materialize(grown: ParameterSource, device: torch.device | str, world: World = ONE_PROCESS) -> Transformer:
    """A network with the grown parameters; no random number is drawn from the global generators."""
    with torch.device("meta"):
        network = Transformer(grown.config)
    network.to(grown.weight("final_norm.weight").dtype)
    world.place(network, torch.device(device))
    fill(world, network, ((name, grown.weight(name)) for name in network.state_dict()))
    return network


def grown_factors(grown: ParameterSource, network: nn.Module) -> dict[str, ParameterFactors]:
    """The factors of all parameters that have any."""
    factors = {name: grown.factors(name) for name, _ in network.named_parameters()}
    return {name: factor for name, factor in factors.items() if factor != ParameterFactors()}


@torch.no_grad()
def grown_state(grown: ParameterSource, network: nn.Module, world: World = ONE_PROCESS) -> dict[str, dict[str, Any]]:
    """The optimizer's state of the grown network, by parameter name; parameters that start afresh are left out."""
    state: dict[str, dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        moments = grown.moments(name)
        if moments is not None:
            first, second = moments.first, moments.second
            tensors = {MOMENTUM: first} if second is None else {"exp_avg": first, "exp_avg_sq": second}
            state[name] = {key: world.part(tensor, parameter) for key, tensor in tensors.items()}
            device = None if parameter.is_meta else parameter.device
            state[name]["step"] = torch.tensor(moments.step, dtype=torch.float32, device=device)
            if moments.births:
                state[name][BIRTHS] = [dict(birth) for birth in moments.births]
    return state


def _wider_config(start: ModelConfig, target: GrowthTarget) -> ModelConfig:
    """`start` with the target's widths; a head keeps its channels, also where dim / num_heads would change."""
    widths: dict[str, Any] = target.widths()
    dim, num_heads = widths.get("dim", start.dim), widths.get("num_heads", start.num_heads)
    keeps = dim == num_heads * start.head_size
    return replace(start, **widths, head_dim=start.head_dim if keeps else start.head_size)


def _check_not_smaller(start: ModelConfig, target: GrowthTarget) -> None:
    now = {
        "dim": start.dim,
        "num_heads": start.num_heads,
        "num_kv_heads": start.kv_heads,
        "ffn_dim": start.ffn_size,
        "num_layers": start.num_layers,
    }
    for name, before in now.items():
        after = getattr(target, name)
        if after is not None and after < before:
            raise InputError(
                f"growth target {name}={after} is smaller than its source's {name}={before}; models grow: "
                f"choose {name} >= {before}"
            )

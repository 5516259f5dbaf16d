"""`growmoe grow CHECKPOINT --config RECIPE --output CHECKPOINT2`: a transition outside a run."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from app.checkpoint import has_state, load_state, open_weights, read_metadata, read_tokenizer_json, write_checkpoint
from app.outputs import check_new_output
from app.parsing import OneLineParser
from modules.config import CHECKPOINT_KEY, ModelConfig
from modules.errors import InputError
from modules.functional.flops import count_parameters
from modules.functional.schedule import Pace, ScheduleConfig, learning_rate_factor
from modules.growth.operation import seeded_generator
from modules.growth.stage import GrowthStage
from modules.growth.transition import (
    Transition,
    build_transition,
    check_drift,
    describe_transition,
    optimizer_parts,
    tensor_source,
)
from modules.layers.transformer import Transformer
from modules.optim import (
    OptimizerConfig,
    ParameterFactors,
    build_optimizer,
    build_scheduler,
    continue_scheduler,
    factor_record,
)
from modules.streamed import streamed_logits, widened
from modules.weights import Spec, Weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def grow(
    checkpoint: Path,
    *,
    config: Path,
    output: Path,
    stage: int | None = None,
    verify: bool = True,
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep",
) -> None:
    """Grow the model of a checkpoint by one stage of a recipe, weights and optimizer state, into a new checkpoint.

    A run that resumes from the new checkpoint with the same recipe goes on as if the transition had happened inside it.
    An imported model grows alike; it has no optimizer state. Weights are computed in float32, and held one at a time.

    Args:
        checkpoint: the directory of a checkpoint, such as RUN/checkpoints/step-00000300, or an imported model.
        config: YAML with the recipe under `growth:`, as `fit` reads it.
        output: the new checkpoint's directory, which must not exist yet.
        stage: which stage of the recipe, counted from 1; the first one not yet applied when left out.
        verify: compare logits before and after, on random tokens, and refuse to write an exact method's model that
            differs by more than rounding; false skips it. What rounding to a smaller dtype adds is printed too.
        dtype: numbers of the new weights. An imported model may have any; one with optimizer state keeps its own.
    """
    check_new_output(output)
    metadata = read_metadata(checkpoint)
    stages = read_recipe(config)
    number = len(metadata["applied_transitions"]) + 1 if stage is None else stage
    if not 1 <= number <= len(stages):
        raise InputError(
            f"stage={number} is not in {config}: it has {len(stages)} stages, and the checkpoint has gone through "
            f"{len(metadata['applied_transitions'])}; choose another stage or checkpoint"
        )
    state = load_state(checkpoint) if has_state(checkpoint) else None
    if state is not None and dtype != "keep":
        raise InputError(f"dtype={dtype} would part the weights from their optimizer state; leave it out, or export")
    grown = grow_model(open_weights(checkpoint), state, metadata, stages[number - 1], DTYPES.get(dtype), verify)
    write_checkpoint(
        output,
        weights=grown.weights,
        metadata={**metadata, **grown.record},
        state=grown.state,
        tokenizer_json=read_tokenizer_json(checkpoint),
    )
    sys.stdout.write(f"{_describe(grown.record['transition_records'][-1])}\n{output}\n")


def read_recipe(path: Path) -> list[GrowthStage]:
    """The stages under `growth:` of a YAML file; other keys of the file are not looked at.

    Raises:
        InputError: no such file, no recipe in it, or a stage that is none.
    """
    if not path.is_file():
        raise InputError(
            f"config={path} is not a file; give the YAML of a growth recipe, such as configs/growth/demo.yaml"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config={path} is not YAML: {error}; correct it") from None
    recipe = content.get("growth") if isinstance(content, dict) else None
    if not isinstance(recipe, dict) or not recipe.get("stages"):
        raise InputError(f"config={path} holds no stages; a recipe is a list under growth.stages")
    parser = OneLineParser(prog="growmoe grow", exit_on_error=False)
    parser.add_argument("--stages", type=list[GrowthStage])
    return list(parser.instantiate_classes(parser.parse_object({"stages": recipe["stages"]})).stages)


@dataclass(frozen=True)
class GrownCheckpoint:
    """What goes into the new checkpoint: weights that are grown as they are read, Lightning's state, the record."""

    weights: Weights
    state: dict[str, Any] | None
    record: dict[str, Any]


def grow_model(
    weights: Weights,
    state: Mapping[str, Any] | None,
    metadata: Mapping[str, Any],
    stage: GrowthStage,
    dtype: torch.dtype | None,
    verify: bool,
) -> GrownCheckpoint:
    """Grow a checkpoint's model by one stage.

    Args:
        state: Lightning's, with the optimizer's state; None where the model has none.
        dtype: of the grown weights; that of the weights before when left out.

    Raises:
        InputError: the stage does not fit the model.
        RuntimeError: an exact method changed logits by more than rounding.
    """
    started = time.perf_counter()
    before = ModelConfig.from_dict(metadata["architecture"])
    factors = {name: ParameterFactors(*values) for name, values in metadata["factors"].items()}
    moments = {} if state is None else _named_moments(before, state["optimizer_states"][0], metadata, factors)
    source = tensor_source(before, lambda name: widened(weights.read(name)), moments, factors)
    dtype = dtype or weights.specs["embedding.weight"].dtype
    copies = stage.copies or ("powers" if dtype in (torch.bfloat16, torch.float16) else "even")
    transition = build_transition(source, replace(stage, copies=copies))
    grown = _stored(transition, dtype)
    drift = _checked_drift(weights, grown, transition, before) if verify else None
    applied = [*metadata["applied_transitions"], stage.identity]
    entry = {
        "step": metadata["step"],
        "tokens": metadata["tokens"],
        **describe_transition(before, transition, stage, drift),
        **dict.fromkeys(
            ("loss_before", "loss_after", "bpb_before", "bpb_after")
        ),  # there is no text to measure them on
        "seconds": round(time.perf_counter() - started, 3),
        "stage": len(applied),
    }
    record = {
        "architecture": transition.config.to_dict(),
        "stage": len(applied),
        "applied_transitions": applied,
        "transition_records": [*metadata["transition_records"], entry],
    }
    if state is None:
        return GrownCheckpoint(grown, None, record)
    new_factors, optimizers, schedulers = _optimizer_states(transition, stage, metadata)
    record["factors"] = factor_record(new_factors)
    rest = {key: value for key, value in state.items() if key != "state_dict"}
    rest |= {"optimizer_states": optimizers, "lr_schedulers": schedulers}
    rest[CHECKPOINT_KEY] = {**state[CHECKPOINT_KEY], **record}
    return GrownCheckpoint(grown, rest, record)


def _stored(transition: Transition, dtype: torch.dtype) -> Weights:
    """The grown weights as they are written: grown wide, then rounded. Buffers, gains and biases, which are few, stay
    in float32: gains take up what is not exact in fewer bits."""
    network = _on_meta(transition.config)
    matrices = {name for name, parameter in network.named_parameters() if parameter.ndim > 1}
    wide = torch.promote_types(dtype, torch.float32)
    specs = {
        name: Spec(dtype if name in matrices else wide, tuple(tensor.shape))
        for name, tensor in network.state_dict().items()
    }
    return Weights(specs, lambda name: transition.grown.weight(name).to(specs[name].dtype))


def _named_moments(
    config: ModelConfig, saved: Mapping[str, Any], record: Mapping[str, Any], factors: Mapping[str, ParameterFactors]
) -> dict[str, dict[str, Tensor]]:
    """A saved optimizer's state by parameter name: it numbers parameters in the order of its groups."""
    network = _on_meta(config)
    optimizer = build_optimizer(network, OptimizerConfig(**record["optimizer"]), factors)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    return {name: saved["state"][number] for number, name in enumerate(order) if number in saved["state"]}


def _optimizer_states(
    transition: Transition, stage: GrowthStage, record: Mapping[str, Any]
) -> tuple[dict[str, ParameterFactors], list[dict[str, Any]], list[dict[str, Any]]]:
    """Factors, and state dictionaries of the grown network's optimizer and of its schedule at the checkpoint's step."""
    network = _on_meta(transition.config)
    factors, moments = optimizer_parts(transition, stage, network)
    optimizer = build_optimizer(network, OptimizerConfig(**record["optimizer"]), factors)
    pace, schedule = Pace(record["total_steps"]), ScheduleConfig(**record["schedule"])
    scheduler = build_scheduler(optimizer, lambda step: learning_rate_factor(step, pace, schedule))
    optimizer.state.update(
        {parameter: moments[name] for name, parameter in network.named_parameters() if name in moments}
    )
    continue_scheduler(scheduler, record["step"])
    return factors, [optimizer.state_dict()], [scheduler.state_dict()]


def _describe(transition: Mapping[str, Any]) -> str:
    kinds, methods = (" + ".join(v) if isinstance(v, list) else v for v in (transition["kind"], transition["method"]))
    before = count_parameters(ModelConfig.from_dict(transition["source"])).total
    drift = transition["max_logit_drift"]
    verified = "not verified" if drift is None else f"largest change of a logit {drift:.2g}"
    exact = "" if transition["exact"] else " (the method is not exact)"
    return (
        f"{kinds} by {methods}: {before / 1e6:.2f}M to {transition['params_total'] / 1e6:.2f}M parameters, "
        f"{verified}{exact}, {transition['seconds']:.1f} s"
    )


def _on_meta(config: ModelConfig) -> Transformer:
    """A network without numbers: names and shapes."""
    with torch.device("meta"):
        return Transformer(config)


def _checked_drift(before: Weights, stored: Weights, transition: Transition, config: ModelConfig) -> float:
    """The largest change of a logit on random tokens, between the weights that are stored; the growth itself is checked
    before they are rounded. Models pass through memory block by block."""
    length = min(64, config.max_seq_len)
    tokens_BL = torch.randint(config.vocab_size, (4, length), generator=seeded_generator(0, "drift"))
    old = streamed_logits(before, config, tokens_BL)
    wide = torch.promote_types(stored.specs["embedding.weight"].dtype, torch.float32)
    exact = _stored(transition, wide)
    drift, largest = _change(old, streamed_logits(exact, transition.config, tokens_BL)), old.abs().max().item()
    check_drift(transition, drift, largest, wide)
    if stored.specs == exact.specs:
        return drift
    return _change(old, streamed_logits(stored, transition.config, tokens_BL))


def _change(before: Tensor, after: Tensor) -> float:
    """The largest change of a logit; NaN counts as infinite."""
    largest = (before - after).abs().max().item()
    return largest if largest == largest else float("inf")

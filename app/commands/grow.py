"""`growmoe grow CHECKPOINT --config RECIPE --output CHECKPOINT2`: a transition outside a run."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from app.checkpoint import TOKENIZER, load_state, read_metadata, write_checkpoint
from app.parsing import OneLineParser
from modules.config import CHECKPOINT_KEY, ModelConfig
from modules.errors import InputError
from modules.functional.flops import count_parameters
from modules.functional.schedule import ScheduleConfig
from modules.growth.operation import seeded_generator
from modules.growth.transition import (
    Grown,
    GrowthStage,
    apply_stage,
    check_drift,
    describe_transition,
    network_source,
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

PREFIX = "network."


def grow(checkpoint: Path, *, config: Path, output: Path, stage: int | None = None) -> None:
    """Grow the model of a checkpoint by one stage of a recipe, weights and optimizer state, into a new checkpoint.

    A run that resumes from the new checkpoint with the same recipe goes on as if the transition had happened inside it.

    Args:
        checkpoint: the directory of a checkpoint, such as RUN/checkpoints/step-00000300.
        config: YAML with the recipe under `growth:`, as `fit` reads it.
        output: the new checkpoint's directory, which must not exist yet.
        stage: which stage of the recipe, counted from 1; the first one not yet applied when left out.
    """
    if output.exists():
        raise InputError(f"output={output} exists, and checkpoints are never overwritten; choose another name")
    metadata = read_metadata(checkpoint)
    stages = read_recipe(config)
    number = len(metadata["applied_transitions"]) + 1 if stage is None else stage
    if not 1 <= number <= len(stages):
        raise InputError(
            f"stage={number} is not in {config}: it has {len(stages)} stages, and the checkpoint has gone through "
            f"{len(metadata['applied_transitions'])}; choose another stage or checkpoint"
        )
    state, tokenizer_json = load_state(checkpoint), (checkpoint / TOKENIZER).read_text(encoding="utf-8")
    transition = grow_state(state, metadata, stages[number - 1])
    write_checkpoint(output, state, tokenizer_json, {**metadata, **state[CHECKPOINT_KEY]})
    sys.stdout.write(f"{_describe(transition)}\n{output}\n")


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


def grow_state(state: dict[str, Any], metadata: Mapping[str, Any], stage: GrowthStage) -> dict[str, Any]:
    """Grow Lightning's checkpoint dictionary in place by one stage; returns the record of the transition.

    Raises:
        InputError: the stage does not fit the model.
        RuntimeError: an exact method changed logits by more than rounding.
    """
    started = time.perf_counter()
    record = state[CHECKPOINT_KEY]
    factors = {name: ParameterFactors(*values) for name, values in record["factors"].items()}
    old = _network(ModelConfig.from_dict(record["architecture"]), state["state_dict"])
    optimizer = build_optimizer(old, OptimizerConfig(**record["optimizer"]), factors)
    optimizer.load_state_dict(state["optimizer_states"][0])
    named = {name: optimizer.state[p] for name, p in old.named_parameters() if p in optimizer.state}
    grown = apply_stage(network_source(old, named, factors), stage, "cpu")
    drift, largest = _drift(old, grown.network)
    check_drift(grown, drift, largest)
    applied = [*record["applied_transitions"], stage.identity]
    transition = {
        "step": metadata["step"],
        "tokens": metadata["tokens"],
        **describe_transition(old.config, grown, stage, drift),
        "loss_before": None,  # there is no text here to measure it on
        "loss_after": None,
        "seconds": round(time.perf_counter() - started, 3),
        "stage": len(applied),
    }
    state["state_dict"] = {PREFIX + name: weight for name, weight in grown.network.state_dict().items()}
    state["optimizer_states"], state["lr_schedulers"] = _optimizer_states(grown, record, metadata["step"])
    state[CHECKPOINT_KEY] = {
        **record,
        "architecture": grown.network.config.to_dict(),
        "stage": len(applied),
        "applied_transitions": applied,
        "transition_records": [*record["transition_records"], transition],
        "factors": factor_record(grown.factors),
    }
    return transition


def _optimizer_states(
    grown: Grown, record: Mapping[str, Any], step: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """State dictionaries of the grown network's optimizer and schedule, at `step`."""
    optimizer = build_optimizer(grown.network, OptimizerConfig(**record["optimizer"]), grown.factors)
    scheduler = build_scheduler(optimizer, ScheduleConfig(**record["schedule"]), record["total_steps"])
    optimizer.state.update(
        {parameter: grown.state[name] for name, parameter in grown.network.named_parameters() if name in grown.state}
    )
    continue_scheduler(scheduler, step)
    return [optimizer.state_dict()], [scheduler.state_dict()]


def _describe(transition: Mapping[str, Any]) -> str:
    kinds, methods = (" + ".join(v) if isinstance(v, list) else v for v in (transition["kind"], transition["method"]))
    before = count_parameters(ModelConfig.from_dict(transition["source"])).total
    exact = "" if transition["exact"] else " (the method is not exact)"
    return (
        f"{kinds} by {methods}: {before / 1e6:.2f}M to {transition['params_total'] / 1e6:.2f}M parameters, "
        f"largest change of a logit {transition['max_logit_drift']:.2g}{exact}, {transition['seconds']:.1f} s"
    )


def _network(config: ModelConfig, state_dict: Mapping[str, Tensor]) -> Transformer:
    with torch.device("meta"):
        network = Transformer(config)
    network.load_state_dict({name.removeprefix(PREFIX): w for name, w in state_dict.items()}, assign=True)
    return network.requires_grad_().eval()


@torch.no_grad()
def _drift(old: Transformer, new: Transformer) -> tuple[float, float]:
    """The largest change of a logit on random tokens, and the largest logit."""
    length = min(64, old.config.max_seq_len)
    tokens_BL = torch.randint(old.config.vocab_size, (4, length), generator=seeded_generator(0, "drift"))
    before, after = (
        network.logits(network(tokens_BL, decoding=not network.config.looks_ahead)[0]) for network in (old, new.eval())
    )
    return (before - after).abs().max().item(), before.abs().max().item()

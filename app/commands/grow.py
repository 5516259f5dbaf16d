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
    GrowthStage,
    build_chain,
    grown_factors,
    grown_state,
    is_exact,
    materialize,
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
EXACT_DRIFT = 1e-4
"""What rounding may change of a logit, relative to the largest (float32 weights)."""


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
    started = time.perf_counter()
    state, tokenizer_json = load_state(checkpoint), (checkpoint / TOKENIZER).read_text(encoding="utf-8")
    outcome = grow_state(state, metadata, stages[number - 1])
    write_checkpoint(output, state, tokenizer_json, {**metadata, **state[CHECKPOINT_KEY]})
    sys.stdout.write(f"{outcome}, {time.perf_counter() - started:.1f} s\n{output}\n")


def read_recipe(path: Path) -> list[GrowthStage]:
    """The stages under `growth:` of a YAML file; other keys of the file are not looked at.

    Raises:
        InputError: no such file, no recipe in it, or a stage that is none.
    """
    if not path.is_file():
        raise InputError(
            f"config={path} is not a file; give the YAML of a growth recipe, such as configs/growth/demo.yaml"
        )
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe = content.get("growth") if isinstance(content, dict) else None
    if not isinstance(recipe, dict) or not recipe.get("stages"):
        raise InputError(f"config={path} holds no stages; a recipe is a list under growth.stages")
    parser = OneLineParser(prog="growmoe grow", exit_on_error=False)
    parser.add_argument("--stages", type=list[GrowthStage])
    return list(parser.instantiate_classes(parser.parse_object({"stages": recipe["stages"]})).stages)


def grow_state(state: dict[str, Any], metadata: Mapping[str, Any], stage: GrowthStage) -> str:
    """Grow Lightning's checkpoint dictionary in place by one stage; returns what was done, in words.

    Raises:
        InputError: the stage does not fit the model.
        RuntimeError: an exact method changed logits by more than rounding.
    """
    record = state[CHECKPOINT_KEY]
    factors = {name: ParameterFactors(*values) for name, values in record["factors"].items()}
    settings, schedule = OptimizerConfig(**record["optimizer"]), ScheduleConfig(**record["schedule"])
    old = _network(ModelConfig.from_dict(record["architecture"]), state["state_dict"])
    optimizer = build_optimizer(old, settings, factors)
    optimizer.load_state_dict(state["optimizer_states"][0])
    named = {name: optimizer.state[p] for name, p in old.named_parameters() if p in optimizer.state}
    grown, kinds, methods = build_chain(network_source(old, named, factors), stage)
    new = materialize(grown, "cpu")
    drift = _drift(old, new)
    if is_exact(new.config, methods) and not drift <= EXACT_DRIFT:
        raise RuntimeError(f"{methods} changed a logit by {drift:.3g} of the largest, and is exact up to {EXACT_DRIFT}")
    mapped = stage.optimizer_state == "mapped"
    new_factors = grown_factors(grown, new) if mapped else {}
    new_optimizer = build_optimizer(new, settings, new_factors)
    scheduler = build_scheduler(new_optimizer, schedule, record["total_steps"])
    carried = grown_state(grown, new) if mapped else {}
    new_optimizer.state.update({p: carried[name] for name, p in new.named_parameters() if name in carried})
    continue_scheduler(scheduler, metadata["step"])
    applied = [*record["applied_transitions"], stage.identity]
    state["state_dict"] = {PREFIX + name: weight for name, weight in new.state_dict().items()}
    state["optimizer_states"], state["lr_schedulers"] = [new_optimizer.state_dict()], [scheduler.state_dict()]
    state[CHECKPOINT_KEY] = {
        **record,
        "architecture": new.config.to_dict(),
        "stage": len(applied),
        "applied_transitions": applied,
        "factors": factor_record(new_factors),
    }
    before, after = (count_parameters(network.config).total / 1e6 for network in (old, new))
    exact = "" if is_exact(new.config, methods) else " (the method is not exact)"
    return (
        f"{' + '.join(kinds)} by {' + '.join(methods)}: {before:.2f}M to {after:.2f}M parameters, "
        f"largest change of a logit {drift:.2g} of the largest logit{exact}"
    )


def _network(config: ModelConfig, state_dict: Mapping[str, Tensor]) -> Transformer:
    with torch.device("meta"):
        network = Transformer(config)
    network.load_state_dict({name.removeprefix(PREFIX): w for name, w in state_dict.items()}, assign=True)
    return network.requires_grad_()


@torch.no_grad()
def _drift(old: Transformer, new: Transformer) -> float:
    """The largest change of a logit on random tokens, relative to the largest logit."""
    length = min(64, old.config.max_seq_len)
    tokens_BL = torch.randint(old.config.vocab_size, (4, length), generator=seeded_generator(0, "drift"))
    before, after = (network.logits(network(tokens_BL)[0]) for network in (old, new))
    return ((before - after).abs().max() / before.abs().max()).item()

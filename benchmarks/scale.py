"""Layouts and estimates of large models on many ranks, without any of them: the tables of docs/scale.md.

    python -m benchmarks.scale > tables.md

For each model the layout with the shortest estimated step is taken, of those whose estimated memory fits, and of
equally fast ones the smallest. Every device
gets as many tokens whatever the layout.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from app.scale.estimate import ScaleEstimate
from app.scale.hardware import Hardware
from app.scale.shards import fake_world, shards_of
from app.scale.workload import Workload
from app.strategies.layout import Layout
from app.strategies.parallelize import Recomputation, Wrapping
from modules.config import ModelConfig
from modules.errors import InputError
from modules.functional.flops import count_parameters, training_flops_per_token

PAIRS = {
    "6.4B, 64 experts": ("dense_6_4b", "moe_6_4b", 32_768),
    "12.6B, 64 experts": ("dense_12_6b", "moe_12_6b", 32_768),
    "29.6B, 64 experts": ("dense_29_6b", "moe_29_6b", 32_768),
    "AquilaMoE 8x16B": ("aquila_16b", "aquila_8x16b", 151_851),
}
"""Names of dense and MoE files in configs/model, and the size of the vocabulary."""
WORLD_SIZES = (64, 256, 1024)
SEQ_LEN = 4096
SEQUENCES = 4
"""Of each device in a micro-batch; one micro-batch is a step."""
GOAL = 0.2
"""Increase of the step time from dense to MoE."""
RECOMPUTATIONS: tuple[Recomputation, ...] = ("none", "selective", "full")
WRAPPINGS = [
    Wrapping(kind, reshard_after_forward=again, gathers="bfloat16")
    for kind in RECOMPUTATIONS
    for again in (True, False)
]


@dataclass(frozen=True)
class Chosen:
    """The fastest of the layouts that fit, or the smallest of all where none does."""

    estimate: ScaleEstimate
    fits: bool


def read_model(name: str, vocab_size: int) -> ModelConfig:
    """The architecture of a file in configs/model."""
    text = (Path(__file__).parents[1] / "configs" / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    architecture: dict[str, Any] = yaml.safe_load(text)["model"]["init_args"]["architecture"]
    return ModelConfig.from_dict({"vocab_size": vocab_size, **architecture})


def candidates(config: ModelConfig, world_size: int) -> Iterator[Layout]:
    """Layouts that are worth a look: channels inside a node, weights shared out over 64 devices at least."""
    experts = 1 if config.moe is None else config.moe.num_experts
    for tp in (1, 2, 4, 8):
        for dp_shard in sorted({max(64, world_size // copies) // tp for copies in (1, 4, 16)}):
            for ep in (2**k for k in range(experts.bit_length())):
                layout = Layout(world_size // tp // dp_shard, dp_shard, ep, tp)
                if dp_shard % ep == 0 and (ep > 1 or experts == 1) and _is_possible(layout, config):
                    yield layout


def _is_possible(layout: Layout, config: ModelConfig) -> bool:
    try:
        layout.check(config)
    except InputError:
        return False
    return True


def choose(config: ModelConfig, world_size: int, hardware: Hardware) -> Chosen:
    """Try all candidates."""
    tried = []
    for layout in candidates(config, world_size):
        with fake_world(0, world_size):
            shards = shards_of(config, layout, 0, wrapping=WRAPPINGS[0])
        for wrapping in WRAPPINGS:
            work = Workload(config, layout, SEQUENCES * layout.tp, SEQ_LEN, wrapping)
            tried.append(ScaleEstimate(work, hardware, shards, shards))
    fitting = [each for each in tried if each.memory.total <= hardware.memory_bytes]
    if fitting:
        return Chosen(min(fitting, key=lambda each: (round(each.step_seconds, 2), each.memory.total)), True)
    return Chosen(min(tried, key=lambda each: each.memory.total), False)


def table(name: str, dense: ModelConfig, moe: ModelConfig, hardware: Hardware) -> Iterator[str]:
    """Markdown of one pair on all numbers of ranks."""
    total, active = count_parameters(moe).total, count_parameters(moe).active
    flops = training_flops_per_token(moe, SEQ_LEN) / training_flops_per_token(dense, SEQ_LEN) - 1
    yield f"### {name}: {count_parameters(dense).total / 1e9:.1f}B dense, {total / 1e9:.0f}B with experts"
    yield f"{active / 1e9:.1f}B active; {flops:+.0%} FLOPs per token with all slots of experts.\n"
    yield (
        "| ranks | model | dp_replicate × dp_shard, ep, tp | again | parameters over even | ~ memory | all-gather | "
        "reduce-scatter | all-reduce | all-to-all | ~ products | ~ beside | ~ waited for | ~ step | ~ increase |"
    )
    yield "|" + "---|" * 15
    for world_size in WORLD_SIZES:
        chosen = {"dense": choose(dense, world_size, hardware), "MoE": choose(moe, world_size, hardware)}
        before, after = chosen["dense"].estimate.step_seconds, chosen["MoE"].estimate.step_seconds
        increase = f"{after / before - 1:+.0%}" + ("" if after / before - 1 < GOAL else ", over the goal")
        for kind, each in chosen.items():
            yield _row(world_size, kind, each, increase if kind == "MoE" else "")


def _row(world_size: int, kind: str, chosen: Chosen, increase: str) -> str:
    each = chosen.estimate
    layout, by_kind, wrapping = each.work.layout, each.bytes_by_kind, each.work.wrapping
    memory = f"{each.memory.total / 1e9:.0f} GB" + ("" if chosen.fits else ": does not fit")
    again = wrapping.activation_checkpointing + ("" if wrapping.reshard_after_forward else ", weights kept")
    cells = [
        f"{world_size:,}",
        kind,
        f"{layout.dp_replicate} × {layout.dp_shard}, {layout.ep}, {layout.tp}",
        again,
        f"{each.ratio_to_even:.3f}",
        memory,
        *(f"{by_kind[name] / 1e9:.1f}" for name in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")),
        *(f"{each.compute_seconds:.2f} s", f"{each.hidden_seconds:.2f} s", f"{each.waited_seconds:.2f} s"),
        f"{each.step_seconds:.2f} s",
        increase,
    ]
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of all pairs, or of those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hardware", type=Path, help="a file like those in configs/hardware; H100 without it")
    parser.add_argument("--only", choices=PAIRS, action="append", help="one pair of models; may be repeated")
    options = parser.parse_args(arguments)
    given = yaml.safe_load(options.hardware.read_text(encoding="utf-8"))["hardware"] if options.hardware else {}
    hardware = Hardware(**given)
    for name in options.only or PAIRS:
        dense, moe, vocab_size = PAIRS[name]
        for line in table(name, read_model(dense, vocab_size), read_model(moe, vocab_size), hardware):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        sys.stdout.write("\n")


if __name__ == "__main__":
    main()

"""Whole training steps, dense and MoE, of this project and of its peers: tokens/s, ratios, peak memory.

    python -m benchmarks.train_step [--mode fp32 autocast] [--contestants litgpt] [--apart]
    python -m benchmarks.train_step --scaling --plot scaling.png

from the root of the repository; benchmarks/moe_layer.py says how to install the peers. All contestants of a kind start
from the same weights, and their language-model losses are compared before they are timed. A step is: forward, backward,
clipping of the global norm at 1.0, fused AdamW, gradients set to None. Ours is the LightningModule that `growmoe fit`
trains, with its chunked loss; peers have the loss that they train with. The dense network has the MoE's active width.
Peak memory is that of parameters, the optimizer's state and everything that one step allocates beside them.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.model_contestants import PEERS, Model, ModelShape, build_models, our_name
from benchmarks.scaling import Curve, add_sweep_flags, plot_curves

KINDS = ("dense", "MoE")
SWEEPS = {"layers": (1, 2, 4, 8), "seq": (128, 256, 512, 1024, 2048)}
LOSS_TOLERANCE = {"fp32": 1e-5, "autocast": 1e-3}
"""Largest difference of a first loss from ours, relative to it. torchtitan's experts are in bfloat16 in both modes."""


def build(shape: ModelShape, words: Sequence[str] | None, flags: argparse.Namespace) -> dict[str, Model]:
    """The contestants whose names have one of the words, or all; ours are always among them."""
    models = {}
    for name, build_one in build_models(shape, flags.device, flags.compile):
        wanted = not words or any(word in name for word in words)
        if not (wanted or name.startswith("growmoe")):
            continue
        rows = shape.layers * shape.batch * shape.seq * shape.top_k
        needed = rows * 3 * shape.dim * shape.ffn * 4
        if "batched_mm" in name and not timing.has_room(needed, flags.device):
            print(f"{name}: left out, copies of weights for every row would take about {needed / 2**30:,.0f} GiB")
            continue
        models[name] = build_one()
    return models


def check_losses(models: Mapping[str, Model], tokens: Tensor, mode: str) -> dict[str, float]:
    """How far each language-model loss is from ours of the same kind, relative to it.

    Raises:
        SystemExit: one of them computes something else.
    """
    with torch.no_grad():
        losses = {name: model.losses_under(tokens, mode)[1].item() for name, model in models.items()}
    differences = {name: abs(losses[name] / losses[our_name(model.routed)] - 1) for name, model in models.items()}
    for name, difference in differences.items():
        limit = LOSS_TOLERANCE["autocast" if "torchtitan" in name else mode]
        if not difference <= limit:
            raise SystemExit(
                f"{name}, {mode}: loss {losses[name]:.5f} is off by {difference:.1e}, more than {limit:.0e}"
            )
    return differences


def compare(
    models: Mapping[str, Model], differences: Mapping[str, float], tokens: Tensor, mode: str, flags: argparse.Namespace
) -> None:
    """The table of one mode."""
    runs: dict[str, Callable[[], object]] = {name: partial(model.step, tokens, mode) for name, model in models.items()}
    turns = timing.interleave(runs, flags, partial(tokens.random_, flags.vocab), settle=False)
    rows = []
    for name, model in models.items():
        peak = model.held_bytes() + timing.peak_growth(runs[name], flags.device)
        rows.append((*describe(name, model, turns, peak, flags), f"{differences[name]:.0e}"))
    header = ("model", "tokens/s", "over its dense", "growmoe over it", "peak MiB", "page faults", "loss differs")
    timing.print_table(f"{mode}, {describe_shape(flags)}", header, rows)
    for kind in KINDS:
        compare_with_best(kind, turns.seconds)


def describe(name: str, model: Model, turns: timing.Turns, peak: int, flags: argparse.Namespace) -> tuple[str, ...]:
    """The cells of a contestant."""
    seconds, count = turns.seconds, flags.batch * flags.seq
    dense = f"{name.split()[0]} dense"
    has_dense = model.routed and dense in seconds
    ours = our_name(model.routed)
    return (
        name,
        timing.spread([count / value for value in seconds[name]], 0),
        timing.spread(timing.ratios(seconds[name], seconds[dense])) if has_dense else "–",
        timing.spread(timing.ratios(seconds[ours], seconds[name])) if name != ours else "–",
        timing.mebibytes(peak),
        f"{statistics.median(turns.faults[name]):,.0f}",
    )


def compare_with_best(kind: str, seconds: Mapping[str, Sequence[float]]) -> None:
    """Our time over that of the fastest peer."""
    ours = f"growmoe {kind}"
    peers = [name for name in seconds if name.endswith(f" {kind}") and name != ours]
    if peers:
        best = min(peers, key=lambda name: statistics.median(seconds[name]))
        ratio = timing.spread(timing.ratios(seconds[ours], seconds[best]))
        print(f"{ours}: {ratio} times the time of the fastest peer, {best}")
    if kind == "MoE":
        print()


def describe_shape(flags: argparse.Namespace) -> str:
    """The sizes in a line."""
    experts = f"E {flags.experts} k {flags.k}"
    network = f"{flags.layers} layers, D {flags.dim}, F {flags.ffn}, {experts}, {flags.heads} heads, V {flags.vocab}"
    return f"{network}, {flags.batch} × {flags.seq} tokens"


def scaling(shape: ModelShape, flags: argparse.Namespace) -> None:
    """Time per token of our dense and MoE step against layers, and against sequence length with as many tokens."""
    mode, rows, curves = flags.mode[0], [], []
    for variable, values in flags.sweep:
        points = measure_points(shape, variable, values, mode, flags)
        pair = [Curve(variable, kind, values, [point[place] for point in points]) for place, kind in enumerate(KINDS)]
        for value, (dense, moe) in zip(values, points, strict=True):
            rows.append((variable, str(value), f"{dense:.0f}", f"{moe:.0f}", f"{moe / dense:.2f}"))
        rows.append((variable, "exponent", *(f"{curve.exponent:+.2f}" for curve in pair), ""))
        curves += pair
    header = ("variable", "value", "dense", "MoE", "MoE over dense")
    timing.print_table(f"{mode}, from {describe_shape(flags)}: µs per token of a step", header, rows)
    if flags.plot:
        plot_curves(curves, "µs per token", flags.plot)


def measure_points(
    shape: ModelShape, variable: str, values: Sequence[int], mode: str, flags: argparse.Namespace
) -> list[list[float]]:
    """Microseconds per token of our dense and MoE step for each value; one pair of networks is alive at a time."""
    points = []
    for value in values:
        changed = replace(shape, **{variable: value})
        if variable == "seq":
            changed = replace(changed, batch=max(1, shape.batch * shape.seq // value))
        tokens = torch.randint(changed.vocab, (changed.batch, changed.seq + 1), device=flags.device)
        models = build(changed, ["growmoe"], flags)
        runs = {name: partial(model.step, tokens, mode) for name, model in models.items()}
        seconds = timing.interleave(runs, flags, partial(tokens.random_, changed.vocab)).seconds
        points.append([1e6 * min(seconds[f"growmoe {kind}"]) / (changed.batch * changed.seq) for kind in KINDS])
    return points


def main() -> None:
    """Build the contestants, and compare them in each mode."""
    warnings.filterwarnings("ignore", message="In CPU autocast")  # torchtitan's router asks for float32
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 8, "dim": 512, "ffn": 1024, "heads": 8, "experts": 8, "k": 2, "vocab": 32000, "batch": 8}
    for name, default in (sizes | {"seq": 512}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--mode", nargs="+", choices=tuple(LOSS_TOLERANCE), default=list(LOSS_TOLERANCE))
    parser.add_argument("--contestants", nargs="+", help="parts of names; ours are always there")
    parser.add_argument("--apart", action="store_true", help="ours with one package at a time, where memory is short")
    parser.add_argument("--compile", action="store_true", help="compile each of our blocks")
    timing.add_common_flags(parser, rounds=5, repeats=1)
    add_sweep_flags(parser, SWEEPS)
    flags = parser.parse_args()
    timing.set_up(flags)
    sizes_given = (flags.layers, flags.dim, flags.ffn, flags.heads, flags.experts, flags.k, flags.vocab)
    shape = ModelShape(*sizes_given, flags.batch, flags.seq)
    if flags.scaling:
        scaling(shape, flags)
        return
    tokens = torch.randint(flags.vocab, (flags.batch, flags.seq + 1), device=flags.device)
    for words in [[package] for package in PEERS] if flags.apart else [flags.contestants]:
        models = build(shape, words, flags)
        differences = {mode: check_losses(models, tokens, mode) for mode in flags.mode}
        for mode in flags.mode:
            compare(models, differences[mode], tokens, mode, flags)
        del models


if __name__ == "__main__":
    main()

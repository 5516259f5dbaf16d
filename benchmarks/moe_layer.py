"""The routed-expert layer against a dense one of equal active width, and against its peers: forward and backward.

    python -m benchmarks.moe_layer [--shape 512,1024,8,2 --shape 512,512,64,8] [--modes bf16 fp32 autocast]
    python -m benchmarks.moe_layer --scaling --plot scaling.png

from the root of the repository. Peers are left out when they are not installed. For them, an environment of its own:

    python -m venv peers
    peers/bin/pip install -c constraints.txt torch==2.13.0 lightning torchmetrics jsonargparse[signatures,omegaconf] \\
        datasets matplotlib psutil transformers==5.24.0 tyro einops tensorboard torchdata spmd_types==0.2.3 triton
    peers/bin/pip install --no-deps litgpt==0.5.13 torchtitan==0.3.0

(--no-deps: litgpt asks for an older torch by its metadata only.)

All contestants have the same weights and are checked, output and gradient of the input, against a loop over experts in
float64 before they are timed. The loss is the product with a fixed probe, plus the layer's routing losses: 0.01 balance
and, for ours, 0.001 z-loss. Modes: bf16 has parameters and input in bfloat16, fp32 both in float32, and autocast runs
them in float32 under torch.autocast to bfloat16. A turn that is not timed comes before each one that is.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.layer_contestants import Layer, build_layers, our_layer
from benchmarks.layer_weights import LayerShape, Weights, draw_tokens, draw_weights, reference_output
from benchmarks.pieces import PIECES, Pieces, both_ways, clock_run, fastest
from benchmarks.scaling import Curve, add_sweep_flags, plot_curves
from modules.layers.experts import RoutedExperts

SHAPES = ("512,1024,8,2", "512,512,64,8")
MODES = ("bf16", "fp32", "autocast")
TOLERANCE = {"bf16": 2e-2, "fp32": 1e-5, "autocast": 2e-2}
"""Largest difference from the reference, relative to its largest entry; bfloat16 has 8 bits."""
SWEEPS = {
    "T": (256, 512, 1024, 2048, 4096, 8192),
    "D": (128, 256, 512, 1024, 2048),
    "F": (128, 256, 512, 1024, 2048),
    "E": (4, 8, 16, 32, 64),
    "k": (1, 2, 4, 8),
}


class Inputs:
    """Hidden states for all contestants of a case, renewed before every run, and the probe of the loss."""

    def __init__(self, hidden: Tensor, mode: str) -> None:
        self.dtype = torch.bfloat16 if mode == "bf16" else torch.float32
        self.probe = torch.randn_like(hidden).to(self.dtype)
        self.pool_ND = torch.randn(4 * hidden.shape[1], hidden.shape[2], device=hidden.device).to(self.dtype)
        self.hidden = hidden.to(self.dtype, copy=True).requires_grad_()

    def renew(self) -> None:
        """Other tokens, and so other loads of the experts."""
        tokens = torch.randint(len(self.pool_ND), self.hidden.shape[1:2], device=self.hidden.device)
        self.hidden = self.pool_ND.index_select(0, tokens)[None].requires_grad_()


class Case:
    """One layer in one mode: what is run."""

    def __init__(self, layer: Layer, inputs: Inputs, mode: str) -> None:
        self.layer, self.inputs, self.mode = layer, inputs, mode
        layer.module.to(inputs.dtype).train()

    def autocast(self) -> AbstractContextManager:
        """The mode's context of the forward pass."""
        return torch.autocast(self.inputs.hidden.device.type, torch.bfloat16, enabled=self.mode == "autocast")

    def loss(self, with_routing: bool = True) -> Tensor:
        """The output times the probe, plus the routing losses."""
        with self.autocast():
            output, routing_loss = self.layer.run(self.inputs.hidden)
        loss = (output * self.inputs.probe).sum()
        return loss if routing_loss is None or not with_routing else loss + routing_loss

    def clear(self) -> None:
        """No gradients."""
        self.inputs.hidden.grad = None
        self.layer.module.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Forward and backward."""
        self.clear()
        self.loss().backward()

    def clocked(self, record: list[Pieces]) -> None:
        """Forward and backward of ours, with its pieces clocked into a record."""
        assert isinstance(self.layer.module, RoutedExperts)
        self.clear()
        record.append(clock_run(self.layer.module, self.loss, self.inputs.hidden.device.type))

    def difference(self, output: Tensor, gradient: Tensor) -> float:
        """Largest relative difference of output and input gradient from the reference."""
        self.clear()
        with self.autocast(), torch.no_grad():
            mine = self.layer.run(self.inputs.hidden)[0]
        self.loss(with_routing=False).backward()
        assert self.inputs.hidden.grad is not None
        pairs = ((mine, output), (self.inputs.hidden.grad, gradient))
        self_difference = max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
        self.clear()
        return self_difference


def reference(inputs: Inputs, weights: Weights, shape: LayerShape) -> tuple[Tensor, Tensor]:
    """Output and input gradient in float64."""
    wide = inputs.hidden.detach().double().requires_grad_()
    output = reference_output(wide, weights, shape)
    gradient = torch.autograd.grad((output * inputs.probe.double()).sum(), wide)[0]
    return output.detach(), gradient


def too_large(name: str, shape: LayerShape, tokens: int, mode: str, device: str) -> str | None:
    """Why a contestant cannot run here: batched_mm copies the weights of its expert for every routed row."""
    if not name.endswith("batched_mm"):
        return None
    width = 4 if mode == "fp32" else 2 if mode == "bf16" else 6
    needed = tokens * shape.top_k * 6 * shape.dim * shape.expert_dim * width  # three matrices, and their gradients
    if timing.has_room(needed, device):
        return None
    return f"{name}: left out, its copies of weights for every row would take about {needed / 2**30:.0f} GiB"


def build_cases(shape: LayerShape, mode: str, flags: argparse.Namespace) -> tuple[dict[str, Case], dict[str, float]]:
    """The contestants of one shape and mode, and how far each is from the reference.

    Raises:
        SystemExit: one of them computes something else.
    """
    weights = draw_weights(shape, flags.device)
    inputs = Inputs(draw_tokens(shape, weights, flags.tokens), mode)
    output, gradient = reference(inputs, weights, shape)
    cases: dict[str, Case] = {}
    differences: dict[str, float] = {}
    for name, build in build_layers(shape, weights):
        if name != "dense" and flags.contestants and not any(word in name for word in flags.contestants):
            continue
        reason = too_large(name, shape, flags.tokens, mode, flags.device)
        if reason:
            print(reason)
            continue
        case = cases[name] = Case(build(), inputs, mode)
        if name == "dense":
            continue
        differences[name] = case.difference(output, gradient)
        limit = TOLERANCE["bf16" if case.layer.always_bf16 else mode]
        if not differences[name] <= limit and name != "gshard":  # which drops tokens when loads are uneven
            raise SystemExit(f"{name}, {mode}, {shape}: off by {differences[name]:.1e}, more than {limit:.0e}")
    return cases, differences


def compare(shape: LayerShape, mode: str, flags: argparse.Namespace) -> None:
    """The table of one shape and mode, and where our time goes."""
    cases, differences = build_cases(shape, mode, flags)
    dtype = torch.float32 if mode == "fp32" else torch.bfloat16
    product, product_flops = timing.product_run(dtype, flags.device)
    runs: dict[str, Callable[[], object]] = {"product": product} | {name: case.step for name, case in cases.items()}
    pieces: list[Pieces] = []
    if "growmoe" in cases:
        runs["pieces"] = partial(cases["growmoe"].clocked, pieces)
    turns = timing.interleave(runs, flags, next(iter(cases.values())).inputs.renew)
    seconds = turns.seconds
    peaks = {}
    for name, case in cases.items():
        case.clear()
        peaks[name] = timing.peak_growth(case.step, flags.device)
        case.clear()
    rate = [product_flops / value for value in seconds["product"]]
    rows = []
    for name in cases:
        share = [100 * shape.flops(flags.tokens) / value / its for value, its in zip(seconds[name], rate, strict=True)]
        rows.append(
            (
                name,
                timing.spread(timing.ratios(seconds[name], seconds["dense"])),
                f"{1e3 * statistics.median(seconds[name]):.1f}",
                f"{statistics.median(share):.0f} %",
                timing.mebibytes(peaks[name]),
                f"{statistics.median(turns.faults[name]):,.0f}",
                f"{differences[name]:.0e}" if name in differences else "–",
            )
        )
    peak = statistics.median(rate)
    title = f"{mode}, {shape}, T {flags.tokens}; large product {peak / 1e9:,.0f} GFLOP/s"
    header = ("layer", "time over dense", "ms", "share of peak", "peak MiB", "page faults", "largest difference")
    timing.print_table(title, header, rows)
    if pieces:
        dense = statistics.median(seconds["dense"])
        show_pieces(f"{mode}, {shape}", fastest(pieces), shape.flops(flags.tokens) / peak, dense)


def show_pieces(title: str, seconds: Pieces, bound: float, dense: float) -> None:
    """Where our layer's time goes; `bound` is the time of the expert products at the machine's peak."""
    whole, rows = both_ways(seconds, "whole"), []
    for piece in (*PIECES, "whole"):
        ways = [f"{1e3 * seconds.get((piece, way), 0.0):.2f}" for way in ("forward", "backward")]
        both = both_ways(seconds, piece)
        rows.append((piece, *ways, f"{1e3 * both:.2f}", f"{100 * both / whole:.1f} %", f"{both / dense:.3f}"))
    last = (f"{1e3 * bound:.2f}", f"{100 * bound / whole:.1f} %", f"{bound / dense:.3f}")
    header = ("piece of growmoe", "forward ms", "backward ms", "both", "share", "over dense")
    timing.print_table(f"{title}: pieces of the fastest run", header, [*rows, ("products at peak", "", "", *last)])


def scaling(flags: argparse.Namespace) -> None:
    """Our layer's time per token against each dimension, and the part of it that is not expert products."""
    mode, base = flags.modes[0], LayerShape.parse(flags.shape[0])
    rows, curves = [], []
    for variable, values in flags.sweep:
        points = measure_points(variable, values, base, mode, flags)
        curves.append(Curve(variable, "whole layer", values, [whole for whole, _ in points]))
        curves.append(Curve(variable, "all but the experts", values, [rest for _, rest in points]))
        for value, (whole, rest) in zip(values, points, strict=True):
            rows.append((variable, str(value), f"{whole:.2f}", f"{rest:.2f}", f"{100 * rest / whole:.1f} %"))
        rows.append((variable, "exponent", f"{curves[-2].exponent:+.2f}", f"{curves[-1].exponent:+.2f}", ""))
    header = ("variable", "value", "whole layer", "without experts", "share")
    timing.print_table(f"{mode}, from {base}, T {flags.tokens}: forward and backward, µs per token", header, rows)
    if flags.plot:
        plot_curves(curves, "µs per token", flags.plot)


def measure_points(
    variable: str, values: Sequence[int], base: LayerShape, mode: str, flags: argparse.Namespace
) -> list[tuple[float, float]]:
    """Microseconds per token of our layer, and of it without the experts, for each value of one dimension."""
    records: dict[int, list[Pieces]] = {value: [] for value in values}
    tokens: dict[int, int] = {}
    runs: dict[str, Callable[[], object]] = {}
    all_inputs: list[Inputs] = []
    for value in values:
        sizes = {"D": base.dim, "F": base.expert_dim, "E": base.num_experts, "k": base.top_k, "T": flags.tokens}
        sizes[variable] = value
        shape, tokens[value] = LayerShape(sizes["D"], sizes["F"], sizes["E"], sizes["k"]), sizes["T"]
        inputs = Inputs(torch.randn(1, tokens[value], shape.dim, device=flags.device), mode)
        layer = our_layer(shape, draw_weights(shape, flags.device))
        runs[str(value)] = partial(Case(layer, inputs, mode).clocked, records[value])
        all_inputs.append(inputs)

    def renew() -> None:
        for inputs in all_inputs:
            inputs.renew()

    timing.interleave(runs, flags, renew)
    points = []
    for value in values:
        seconds, per_token = fastest(records[value]), 1e6 / tokens[value]
        rest = both_ways(seconds, "whole") - both_ways(seconds, "experts")
        points.append((per_token * both_ways(seconds, "whole"), per_token * rest))
    return points


def main() -> None:
    """Compare, or show how cost grows."""
    warnings.filterwarnings("ignore", message="In CPU autocast")  # torchtitan's router asks for float32
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help=f"D,F,E,k; repeat for more; default {' and '.join(SHAPES)}")
    parser.add_argument("--tokens", type=int, default=2048, help="T")
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), help="with --scaling the first counts"
    )
    parser.add_argument("--contestants", nargs="+", help="parts of names; the dense layer is always there")
    timing.add_common_flags(parser, rounds=7, repeats=3)
    add_sweep_flags(parser, SWEEPS)
    flags = parser.parse_args()
    flags.shape = flags.shape or list(SHAPES)
    timing.set_up(flags)
    if flags.scaling:
        scaling(flags)
        return
    for mode in flags.modes:
        for shape in flags.shape:
            compare(LayerShape.parse(shape), mode, flags)


if __name__ == "__main__":
    main()

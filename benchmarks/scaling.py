"""Exponents of cost on log-log axes, and their picture."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """One quantity against one variable."""

    variable: str
    label: str
    values: Sequence[float]
    costs: Sequence[float]

    @property
    def exponent(self) -> float:
        """The slope of the least-squares line through the logarithms."""
        return float(np.polyfit(np.log(self.values), np.log(self.costs), 1)[0])


def plot_curves(curves: Sequence[Curve], unit: str, path: str) -> None:
    """A log-log plot for each variable, its curves with their fitted lines and exponents."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_variable: dict[str, list[Curve]] = {}
    for curve in curves:
        by_variable.setdefault(curve.variable, []).append(curve)
    figure, axes = pyplot.subplots(1, len(by_variable), figsize=(4 * len(by_variable), 4), squeeze=False)
    for axis, (variable, members) in zip(axes[0], by_variable.items(), strict=True):
        for number, curve in enumerate(members):
            _plot_one(axis, curve, f"C{number}")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel(variable)
        axis.set_ylabel(unit)
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


def _plot_one(axis: object, curve: Curve, color: str) -> None:
    values = np.asarray(curve.values, dtype=float)
    slope, offset = np.polyfit(np.log(values), np.log(curve.costs), 1)
    axis.plot(values, curve.costs, "o", color=color, label=f"{curve.label}, exponent {slope:+.2f}")  # type: ignore
    axis.plot(values, np.exp(offset) * values**slope, "-", color=color, alpha=0.5)  # type: ignore


def parse_sweep(text: str) -> tuple[str, list[int]]:
    """From `T=256,512,1024`."""
    name, values = text.split("=")
    return name, [int(value) for value in values.split(",")]


def add_sweep_flags(parser: argparse.ArgumentParser, defaults: Mapping[str, Sequence[int]]) -> None:
    """`--scaling`, `--sweep` and `--plot`."""
    shown = "; ".join(f"{name}={','.join(map(str, values))}" for name, values in defaults.items())
    parser.add_argument("--scaling", action="store_true", help="how cost grows, instead of the comparison")
    parser.add_argument("--sweep", nargs="+", type=parse_sweep, help=f"values of the variables; default {shown}")
    parser.add_argument("--plot", metavar="FILE", help="with --scaling: log-log plots as a picture")
    parser.set_defaults(sweep=[(name, list(values)) for name, values in defaults.items()])

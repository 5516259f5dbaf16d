"""Expert load as heat maps: every layer at the end of the run, and one layer over the run.

Colour is the load against an even share, on a logarithmic scale around 1; black is an expert without a token.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from app.report.data import RunData
from app.report.drawing import finish, new_figure, plain
from app.report.load import FinalLoad, LoadOverTime
from app.report.theme import CARD, DEAD_COLOR, INK, LOAD_COLORS, LOAD_TEXT, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

RANGE = 4.0
"""loads from a quarter to four times the even share have their own colour"""
IMAGE_SIZE = 640
"""pixels of a picture's width and height, about"""
MOST_CELLS = 16
"""experts and layers up to which each cell shows its number"""
MOST_LINES = 64
"""experts and layers up to which cells have borders"""


def final_map(final: FinalLoad) -> "Figure":
    """Expert (x) by layer (y) at the end of the run."""
    num_layers = len(final.ratios_NE)
    figure, (axes,) = new_figure((float(np.clip(0.9 + 0.26 * num_layers, 1.5, 6.5)),))
    _color_bar(figure, axes, draw_final_map(axes, final))
    return figure


def draw_final_map(axes: "Axes", final: FinalLoad) -> "ScalarMappable":
    """Draw `final_map` into a panel; returns what its colours stand for."""
    num_layers, num_experts = final.ratios_NE.shape
    colors = _draw_cells(axes, final.ratios_NE, (-0.5, num_experts - 0.5))
    if max(num_layers, num_experts) <= MOST_LINES:
        axes.set_xticks(np.arange(num_experts + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(num_layers + 1) - 0.5, minor=True)
        axes.grid(which="minor", color=CARD, linewidth=1.5 if max(num_layers, num_experts) <= MOST_CELLS else 0.5)
    if max(num_layers, num_experts) <= MOST_CELLS:
        _write_numbers(axes, final.ratios_NE)
    _mark_dead(axes, final.ratios_NE)
    axes.set_xticks(_some(num_experts, 16))
    places = _some(num_layers, 12)
    axes.set_yticks(places, labels=[plain(final.layers[n]) for n in places])
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.grid(visible=False, which="major")
    return colors


def map_over_time(data: RunData, load: LoadOverTime, dead: Sequence[int]) -> "Figure":
    """Tokens (x) by expert (y) for one layer; a cross at the right edge marks the experts that are dead at the end."""
    num_experts = len(load.ratios_EW)
    figure, (axes,) = new_figure((1.1 + 0.1 * min(num_experts, 24),))
    colors = _draw_cells(axes, _even_columns(load), (load.edges[0], load.edges[-1]))
    axes.set_yticks(_some(num_experts, 8))
    axes.set_ylabel("expert")
    size = float(np.clip(120 / num_experts, 1.5, 5))
    edge = axes.get_yaxis_transform()
    axes.plot([1.012] * len(dead), dead, "x", transform=edge, color=INK, markersize=size, clip_on=False)
    axes.grid(visible=False)
    _color_bar(figure, axes, colors)
    before = [data.x_of(t) for t in data.transitions if data.x_of(t) <= load.edges[1]]
    finish(data, [axes], legend=False, start=max(before, default=load.edges[0]))
    axes.set_ylim(num_experts - 0.5, -0.5)
    return figure


def _draw_cells(axes: "Axes", ratios: np.ndarray, span: tuple[float, float]) -> "ScalarMappable":
    """Rows from top to bottom as one picture; its cells have several pixels, so that scaling does not blur them."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    colors = LinearSegmentedColormap.from_list("load", LOAD_COLORS).with_extremes(under=DEAD_COLOR, bad=(0, 0, 0, 0))
    rows, columns = (max(1, IMAGE_SIZE // count) for count in ratios.shape)
    large = np.kron(ratios, np.ones((rows, columns)))
    shown = np.ma.masked_invalid(np.where(large == 0, 0.1 / RANGE, np.clip(large, 1 / RANGE, RANGE)))
    extent = (span[0], span[1], len(ratios) - 0.5, -0.5)
    norm = LogNorm(1 / RANGE, RANGE)
    return axes.imshow(shown, cmap=colors, norm=norm, interpolation="none", aspect="auto", extent=extent)


def _color_bar(figure: "Figure", axes: "Axes", colors: "ScalarMappable") -> None:
    """The scale, with the even share marked; its lower tip is an expert without a token."""
    bar = figure.colorbar(colors, ax=axes, extend="both", pad=0.03, aspect=14, fraction=0.08)
    bar.set_ticks([1 / RANGE, 0.5, 1, 2, RANGE], labels=["1/4", "1/2", "1 = even", "2", "4"])
    bar.minorticks_off()
    assert bar.solids is not None
    bar.solids.set_rasterized(True)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.ax.axhline(1, color=LOAD_TEXT[0], linewidth=1.2)
    bar.ax.annotate(
        "no token", (0.5, -0.05), xycoords="axes fraction", xytext=(0, -3), textcoords="offset points",
        ha="center", va="top", fontsize=8, color=SOFT,
    )  # fmt: skip


def _write_numbers(axes: "Axes", ratios_NE: np.ndarray) -> None:
    for (n, expert), ratio in np.ndenumerate(ratios_NE):
        if np.isfinite(ratio) and ratio > 0:
            color = LOAD_TEXT[int(not 1 / 2.2 < ratio < 2.2)]
            number = f"{ratio:.1f}" if ratio >= 0.05 else ">0"
            axes.text(expert, n, number, ha="center", va="center", fontsize=7.5, color=color)


def _mark_dead(axes: "Axes", ratios_NE: np.ndarray) -> None:
    layers, experts = np.nonzero(ratios_NE == 0)
    size = float(np.clip(120 / max(ratios_NE.shape), 1.5, 6))
    axes.plot(experts, layers, "x", color=LOAD_TEXT[1], markersize=size, markeredgewidth=size / 4)


def _even_columns(load: LoadOverTime) -> np.ndarray:
    """The columns repeated so often that equal pixels stand for equal spans of the x axis."""
    borders = np.linspace(load.edges[0], load.edges[-1], IMAGE_SIZE + 1)
    centres = (borders[1:] + borders[:-1]) / 2
    places = np.searchsorted(load.edges, centres, side="right") - 1
    return load.ratios_EW[:, np.clip(places, 0, load.ratios_EW.shape[1] - 1)]


def _some(count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, at an even distance from 0 on."""
    return list(range(0, count, -(-count // most)))

"""How every figure of the report is drawn: style, token axes, transition marks, and the way into the page as SVG."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from app.report import words
from app.report.data import RunData, Series
from app.report.theme import CARD, INK, LIGHT, LINE, MARK, SERIES, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.4
"""inches; narrow, so that letters stay readable when a phone scales a figure down"""
MAX_POINTS = 1200
"""points of a line that reach the page; longer ones are thinned"""
MARK_ROWS = 3
"""rows of transition labels above a panel before they fall back to numbers"""


@contextmanager
def drawing_style() -> Iterator[None]:
    """The matplotlib settings of all figures; the caller's settings come back afterwards."""
    import matplotlib

    settings: Any = {
        "font.size": 9,
        "text.parse_math": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": LINE,
        "axes.labelcolor": SOFT,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": LINE,
        "grid.linewidth": 0.7,
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "text.color": INK,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": SOFT,
        "ytick.labelcolor": SOFT,
        "lines.linewidth": 1.6,
        "lines.solid_capstyle": "round",
        "legend.facecolor": CARD,
        "legend.edgecolor": "none",
        "legend.framealpha": 0.85,
        "legend.fontsize": 8.5,
        "legend.handlelength": 1.3,
        "legend.borderaxespad": 0.2,
        "svg.fonttype": "none",
        "svg.hashsalt": "growmoe",
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(heights: Sequence[float], columns: int = 1, width: float = WIDTH) -> "tuple[Figure, list[Axes]]":
    """A figure with panels of these heights in inches under each other (or `columns` beside each other)."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    size = (width * columns, sum(heights) + 0.25)
    pad = 0.03 if columns == 1 else 0.06
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=pad, h_pad=pad, hspace=0.04, wspace=0.03))
    ratios = {"height_ratios": heights} if columns == 1 else None
    grid = figure.subplots(len(heights), columns, squeeze=False, gridspec_kw=ratios)
    return figure, list(grid.flat)


def plain(text: Any) -> str:
    """ASCII for figures, whose fonts need not have more; what else there is becomes a question mark."""
    ascii_text = "".join(letter if " " <= letter <= "~" else "?" for letter in str(text))
    return ascii_text if len(ascii_text) <= 30 else f"{ascii_text[:28]}.."


def color_at(index: int) -> str:
    """The colour of the n-th line of a panel."""
    return SERIES[index % len(SERIES)]


def use_log_scale(axes: "Axes", values: np.ndarray) -> None:
    """A logarithmic axis where positive values span more than a factor of 4, as a loss that begins at chance does."""
    from matplotlib.ticker import LogLocator, NullLocator

    if len(values) and 0 < 4 * values.min() < values.max():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def line(axes: "Axes", series: Series, color: str, label: str, **style: Any) -> None:
    """One metric as it was logged."""
    x, y = thin(series.x), thin(series.y)
    points = {"marker": "o", "markersize": 3.4} if len(x) <= 40 else {}
    axes.plot(x, y, color=color, label=plain(label), **{**points, **style})


def smooth_line(axes: "Axes", data: RunData, series: Series, color: str, label: str, faint: float = 0.35) -> None:
    """One noisy metric: faint as logged, and lightly smoothed within each stage, so that jumps at transitions stay."""
    axes.plot(thin(series.x), thin(series.y), color=color, alpha=faint, linewidth=0.8)
    mean = smooth(series, [data.x_of(t) for t in data.transitions])
    axes.plot(mean.x, mean.y, color=color, label=plain(label))


def smooth(series: Series, borders: list[float]) -> Series:
    """A straight line fitted around each point, under a bell about a hundredth of the run wide and less at its start.

    It lags nowhere, is not pulled at the ends of a stage, and does not cross borders.
    """
    stages = np.searchsorted(np.sort(borders), series.x, side="left")  # at a border, the old network still
    empty = np.empty(0)
    parts = [_averaged(series, stages == stage) for stage in np.unique(stages)]
    widest, begin, fitted = sum(len(part.x) for part in parts) / 100, 0, [empty]
    for part in parts:
        places = np.arange(begin, begin + len(part.x))
        fitted.append(_fit_lines(part.y, np.clip(0.1 * places, 0.3, max(widest, 0.3))))
        begin += len(places)
    return Series(np.concatenate([empty, *(part.x for part in parts)]), np.concatenate(fitted))


def _averaged(series: Series, chosen: np.ndarray) -> Series:
    """The chosen points; means of neighbours where there are more than MAX_POINTS."""
    x, y = series.x[chosen], series.y[chosen]
    starts = np.arange(0, len(x), -(-len(x) // MAX_POINTS))
    sizes = np.diff(np.append(starts, len(x)))
    return Series(np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes)


def _fit_lines(y: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Weighted least squares around each point; distances and widths in points."""
    if len(y) < 3:
        return y
    places = np.arange(len(y))
    distance = places[None, :] - places[:, None]
    weight = np.exp(-0.5 * (distance / widths[:, None]) ** 2)
    s0, s1, s2 = weight.sum(1), (weight * distance).sum(1), (weight * distance**2).sum(1)
    t0, t1 = weight @ y, (weight * distance) @ y
    return (s2 * t0 - s1 * t1) / (s0 * s2 - s1**2)


def thin(values: np.ndarray) -> np.ndarray:
    """At most MAX_POINTS values, evenly chosen, first and last among them."""
    if len(values) <= MAX_POINTS:
        return values
    return values[np.linspace(0, len(values) - 1, MAX_POINTS).round().astype(int)]


def finish(data: RunData, panels: "list[Axes]", legend: bool = True, start: float = 0.0) -> None:
    """Token axes, transition marks and legends on panels that lie under each other."""
    end = float(data.x_at([data.last_step])[0])
    for axes in panels:
        axes.set_xlim(start, max(end, start + 1) + 0.015 * (end - start))
        axes.xaxis.set_major_formatter(lambda value, _: words.short(value) if value else "0")
        axes.tick_params(length=0)
        axes.grid(visible=False, axis="x")
        if legend and axes.get_legend() is None and axes.get_legend_handles_labels()[1]:
            axes.legend(loc="best", labelcolor=INK)
        if axes is not panels[-1]:
            axes.tick_params(labelbottom=False)
    panels[-1].set_xlabel(data.x_name)
    _mark_transitions(data, panels)


def to_svg(figure: "Figure", name: str, title: str) -> str:
    """The figure as an `<svg>` element for the page: no prolog, no metadata, colours by variable, ids of its own."""
    from html import escape

    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]*)"', svg)
    svg = svg[svg.index(">") + 1 :]
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", svg)
    for variable in ("ink", "soft", "line", "card", "mark", *(f"c{i}" for i in range(len(SERIES)))):
        svg = svg.replace(LIGHT[variable], f"var(--{variable})")
    return f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{escape(title)}">{svg}'


def legend_below(axes: "Axes") -> None:
    """A legend of two columns under a panel, for lines that leave no room inside it."""
    shape = {"handlelength": 1.6, "columnspacing": 1.4, "labelcolor": INK}
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.19), ncols=2, **shape)


def _mark_transitions(data: RunData, panels: "list[Axes]") -> None:
    """A vertical line per transition in each panel, with its kind above the first one."""
    low, high = panels[0].get_xlim()
    inside = [t for t in data.transitions if low - 0.001 * (high - low) <= data.x_of(t) <= high]
    for transition in inside:
        for axes in panels:
            axes.axvline(data.x_of(transition), color=MARK, linewidth=1, linestyle=(0, (3, 2)), zorder=1.5)
    labels = [plain(words.listed(t.get("kind"))) for t in inside]
    places = [(data.x_of(t) - low) / (high - low) for t in inside]
    rows = _label_rows(places, labels)
    if max(rows, default=0) >= MARK_ROWS:
        labels = [str(number) for number in range(1, len(labels) + 1)]
        rows = [row % MARK_ROWS for row in _label_rows(places, labels)]
    for place, label, row in zip(places, labels, rows, strict=True):
        side = "right" if place + _label_width(label) > 1.02 else "left"
        offset = (-2 if side == "right" else 0, 2 + 10 * row)
        panels[0].annotate(
            label, (place, 1), xycoords="axes fraction", xytext=offset, textcoords="offset points",
            ha=side, va="bottom", fontsize=8, color=SOFT, annotation_clip=False,
        )  # fmt: skip


def _label_width(label: str) -> float:
    """About how much of a panel's width a label takes."""
    return (5.4 * len(label) + 6) / (72 * WIDTH * 0.88)


def _label_rows(places: list[float], labels: list[str]) -> list[int]:
    """The lowest row for each label in which it does not run into an earlier one."""
    ends: list[float] = []
    rows = []
    for place, label in zip(places, labels, strict=True):
        width = _label_width(label)
        begin, end = (place - width, place) if place + width > 1.02 else (place, place + width)
        row = next((i for i, taken in enumerate(ends) if taken <= begin), len(ends))
        ends[row:row + 1] = [end]  # fmt: skip
        rows.append(row)
    return rows


def png_bytes(figure: "Figure") -> bytes:
    """The figure as a PNG on white, for a README."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150, facecolor=CARD, metadata={"Software": "growmoe report"})
    return data.getvalue()

"""The picture of a study: bits per byte and accuracy by step time under each budget, and where steps spend time."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from app.report.drawing import color_at, new_figure, plain
from app.report.theme import INK, MARK, SOFT
from app.study.analysis import Finished, Point, Quality, Spread, front
from callbacks.step_parts import PARTS, REST
from modules.functional.budget import Mode

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vP*X"
COLUMNS: tuple[Mode, ...] = ("step_time", "tokens", "flops")
TITLES = {
    "step_time": "equal accelerator time",
    "tokens": "equal tokens",
    "flops": "equal training FLOPs",
    "own_chinchilla": "own compute-optimal tokens",
}
LABELS: dict[Quality, str] = {"bpb": "bits per byte", "accuracy": "accuracy, %"}


def study_figure(
    finished: Finished, points: Mapping[Mode, Sequence[Point]], measurements: Mapping[str, Any]
) -> "Figure":
    """Rows: bits per byte, accuracy where there is one, and the parts of a step; columns: budgets."""
    modes = [mode for mode in points if points[mode]]
    qualities: list[Quality] = ["bpb"]
    if any(point.accuracy for mode in modes for point in points[mode]):
        qualities.append("accuracy")
    figure, panels = new_figure([2.7] * (len(qualities) + 1), columns=len(modes), width=3.9)
    rows = [panels[start : start + len(modes)] for start in range(0, len(panels), len(modes))]
    for quality, row in zip(qualities, rows, strict=False):
        for mode, axes in zip(modes, row, strict=True):
            if quality == "accuracy" and not any(point.accuracy for point in points[mode]):
                axes.set_axis_off()
                continue
            draw_points(axes, finished, points[mode], quality)
            way = ", before decay" if points[mode] and points[mode][0].is_from_curves else ""
            axes.set_title(f"{TITLES[mode]}{way}", fontsize=9, color=INK)
        row[0].set_ylabel(LABELS[quality])
    draw_legend(rows[0][0], finished)
    grid = rows[-1][0].get_gridspec()
    for axes in rows[-1]:
        axes.remove()
    assert grid is not None
    draw_parts(figure.add_subplot(grid[-1, :]), finished, measurements)
    return figure


def draw_points(axes: "Axes", finished: Finished, points: Sequence[Point], quality: Quality) -> None:
    """Each arm by step time, with an error bar over seeds, and the Pareto front."""
    arms = list(dict.fromkeys(arm.name for arm in finished.arms))
    sizes = list(dict.fromkeys(arm.size for arm in finished.arms))
    for point in points:
        value, scale = (point.bpb, 1) if quality == "bpb" else (point.accuracy, 100)
        if value is None:
            continue
        error = None if value.deviation is None else scale * value.deviation
        axes.errorbar(
            [1000 * point.step_s],
            [scale * value.mean],
            yerr=error,
            color=color_at(arms.index(point.arm)),
            marker=MARKERS[sizes.index(point.size) % len(MARKERS)],
            capsize=2,
            markersize=5,
            linewidth=1,
        )
    if not (points and points[0].is_from_curves):
        best = front(points, quality)
        values = [p.bpb.mean if quality == "bpb" else 100 * _mean(p.accuracy) for p in best]
        axes.plot([1000 * p.step_s for p in best], values, color=MARK, linewidth=1, linestyle=(0, (4, 2)), zorder=1)
    if points:
        use_log_axis(axes)
    axes.set_xlabel("step time, ms")
    axes.tick_params(length=0)


def use_log_axis(axes: "Axes") -> None:
    """Step times on a logarithmic scale, in plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def draw_legend(axes: "Axes", finished: Finished) -> None:
    """Colours are arms, markers sizes."""
    for index, name in enumerate(dict.fromkeys(arm.name for arm in finished.arms)):
        axes.plot([], [], "s", color=color_at(index), markersize=4, label=plain(name.replace("_", " ")))
    for index, name in enumerate(dict.fromkeys(arm.size for arm in finished.arms)):
        axes.plot([], [], MARKERS[index % len(MARKERS)], color=SOFT, markersize=4, label=plain(name))
    axes.legend(loc="best", labelcolor=INK, fontsize=7.5)


def draw_parts(axes: "Axes", finished: Finished, measurements: Mapping[str, Any]) -> None:
    """A bar for each arm: a step over the anchor's of its size, by part."""
    anchors = {
        arm.size: measurements[arm.key]["stages"][-1]["step_s"] for arm in finished.arms if arm.name == finished.anchor
    }
    labels = [f"{arm.size}\n{arm.name.replace('_', ' ')}" for arm in finished.arms]
    bottoms = [0.0] * len(labels)
    for index, part in enumerate(("input", *PARTS)):
        heights = [_share(measurements[arm.key]["stages"][-1], part) / anchors[arm.size] for arm in finished.arms]
        color = MARK if part == REST else color_at(index)
        if any(heights):
            axes.bar(labels, heights, bottom=bottoms, width=0.62, color=color, label=plain(part), alpha=0.9)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.axhline(1.0, color=MARK, linewidth=1, linestyle=(0, (4, 2)))
    axes.set_ylabel("step / anchor's step")
    axes.tick_params(length=0, axis="x", labelsize=7)
    axes.margins(x=0.02)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), labelcolor=INK, fontsize=7.5)


def _share(stage: Mapping[str, Any], part: str) -> float:
    """Seconds of a part; a stage that was not taken apart is all rest."""
    whole = stage["step_s"] if part == REST and not stage["parts_s"] else 0.0
    return stage["parts_s"].get(part, whole)


def _mean(value: Spread | None) -> float:
    return 0.0 if value is None else value.mean

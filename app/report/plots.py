"""The figures of the report. Each function draws one, or returns None when the run did not log what it shows."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from app.report import words
from app.report.data import RunData, Series
from app.report.drawing import color_at, finish, legend_below, line, new_figure, plain, smooth_line, use_log_scale
from app.report.theme import INK, SERIES, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[["Axes", RunData], None]

PANEL_HEIGHT = 2.6
"""inches"""
TASKS_PER_FIGURE = 6


def training_loss(data: RunData) -> "Figure | None":
    """Loss on training batches, overall and per language."""
    return _one_panel(data, draw_training_loss) if data.names("train/loss") else None


def validation(data: RunData) -> "Figure | None":
    """Bits per byte of validation text, per language."""
    return _one_panel(data, draw_bits_per_byte) if data.names("val/bpb_") else None


def accuracy(data: RunData) -> "list[Figure]":
    """Accuracy of the evaluation tasks, a few to a figure."""
    tasks = list(data.accuracies)
    groups = [tasks[first : first + TASKS_PER_FIGURE] for first in range(0, len(tasks), TASKS_PER_FIGURE)]
    return [_one_panel(data, partial(draw_accuracy, tasks=group), _height_with_legend(group)) for group in groups]


def parameters(data: RunData) -> "Figure | None":
    """Parameters of the model, all and those that one token uses."""
    beside = list(data.accuracies)[-TASKS_PER_FIGURE:]  # its neighbour on the page
    return _one_panel(data, draw_parameters, _height_with_legend(beside)) if data.names("growth/params_") else None


def speed(data: RunData) -> "Figure | None":
    """Tokens per second above the time of a step."""
    panels = [
        (("perf/tokens_per_s", "tokens per second", color_at(0)),),
        (("perf/step_ms", "step", color_at(4)), ("perf/data_wait_ms", "of it waiting for data", color_at(1))),
    ]
    return _panels(data, panels, ("tokens / s", "ms"), from_zero=True)


def optimizer(data: RunData) -> "Figure | None":
    """Learning rate above the gradient norm."""
    panels = [
        (("train/lr", "learning rate", color_at(2)),),
        (("train/grad_norm", "gradient norm", color_at(3)),),
    ]
    return _panels(data, panels, ("learning rate", "gradient norm"), smooth=("train/grad_norm",))


def load_variation(data: RunData) -> "Figure | None":
    """How unevenly tokens are spread over experts."""
    return _panels(data, [(("moe/load_cv", "load CV", color_at(0)),)], ("load CV",), smooth=("moe/load_cv",))


def load_peak(data: RunData) -> "Figure | None":
    """How much more than its share the busiest expert takes."""
    name = "moe/max_over_ideal"
    return _panels(data, [((name, "max / ideal", color_at(1)),)], ("max / ideal",), smooth=(name,))


def router(data: RunData) -> "Figure | None":
    """What the routers' probabilities look like: entropy above the size of the logits."""
    names = ("moe/entropy", "moe/logit_rms")
    panels = [((names[0], "entropy", color_at(2)),), ((names[1], "logit RMS", color_at(4)),)]
    return _panels(data, panels, ("entropy, nats", "logit RMS"), smooth=names)


def dropped(data: RunData) -> "Figure | None":
    """Share of first and second choices that found no slot."""
    names = ("moe/dropped_first", "moe/dropped_second")
    lines = [(name, label, color_at(i)) for i, (name, label) in enumerate(zip(names, ("first", "second"), strict=True))]
    return _panels(data, [lines], ("share dropped",), smooth=names, from_zero=True)


def overview(data: RunData) -> "Figure | None":
    """Loss, bits per byte and accuracy beside each other, for a README."""
    draw_tasks = partial(draw_accuracy, tasks=list(data.accuracies))
    draws: list[tuple[str, Draw, object]] = [
        ("Training loss", draw_training_loss, data.names("train/loss")),
        ("Validation bits per byte", draw_bits_per_byte, data.names("val/bpb_")),
        ("Evaluation accuracy", draw_tasks, data.accuracies),
    ]
    shown = [(title, draw) for title, draw, found in draws if found]
    if not shown:
        return None
    figure, panels = new_figure((3.4,), columns=len(shown), width=4.4)
    for axes, (title, draw) in zip(panels, shown, strict=True):
        draw(axes, data)
        finish(data, [axes])
        axes.set_title(title, loc="left", fontsize=11, color=INK, pad=22 if data.transitions else 8)
    note = "  SYNTHETIC data: an invented world, not real text" if data.is_synthetic else ""
    figure.suptitle(f"{plain(data.run_dir.resolve().name)}{note}", x=0.008, ha="left", fontsize=9.5, color=SOFT)
    return figure


def draw_training_loss(axes: "Axes", data: RunData) -> None:
    """Loss into one panel: each language, and all together."""
    overall, per_language = data.series("train/loss"), _per_language(data, "train/loss_")
    for i, label, series in per_language:
        smooth_line(axes, data, series, color_at(i), label, faint=0.25)
    if overall:
        smooth_line(axes, data, overall, INK, "all")
    use_log_scale(axes, np.concatenate([overall.y, *(series.y for _, _, series in per_language)]))
    axes.set_ylabel("nats per token")


def draw_bits_per_byte(axes: "Axes", data: RunData) -> None:
    """Validation of each language into one panel."""
    per_language = _per_language(data, "val/bpb_")
    for i, label, series in per_language:
        line(axes, series, color_at(i), label)
    use_log_scale(axes, np.concatenate([np.empty(0), *(series.y for _, _, series in per_language)]))
    axes.set_ylabel("bits per byte")


def draw_accuracy(axes: "Axes", data: RunData, tasks: Sequence[str]) -> None:
    """These tasks and the levels of guessing into one panel."""
    levels: dict[float, list[str]] = {}
    for i, task in enumerate(tasks):
        again = {"linestyle": ":"} if i >= len(SERIES) else {}  # colours come round
        line(axes, data.accuracies[task], color_at(i), task, clip_on=False, **again)
        if data.chances.get(task):  # guessing free answers reaches 0: the axis itself
            levels.setdefault(round(data.chances[task], 4), []).append(color_at(i))
    for level, colors in levels.items():
        color = colors[0] if len(colors) == 1 and len(tasks) > 1 else SOFT
        axes.axhline(level, color=color, linewidth=1.1, linestyle=(0, (5, 3)), zorder=1.6)
    if levels:
        axes.plot([], [], color=SOFT, linewidth=1.1, linestyle=(0, (5, 3)), label="chance")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    legend_below(axes)


def draw_parameters(axes: "Axes", data: RunData) -> None:
    """Sizes into one panel, as steps that last to the end of the run."""
    end = float(data.x_at([data.last_step])[0])
    for kind, color, label in (("total", color_at(0), "total"), ("active", color_at(2), "active per token")):
        series = data.series(f"growth/params_{kind}")
        if series:
            x, y = np.append(series.x, max(end, series.x[-1])), np.append(series.y, series.y[-1])
            axes.plot(x, y, drawstyle="steps-post", color=color, label=label)
            axes.fill_between(x, y, step="post", color=color, alpha=0.1, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_short_ticks)


def _panels(
    data: RunData,
    panels: Sequence[Sequence[tuple[str, str, str]]],
    units: Sequence[str],
    smooth: Sequence[str] = (),
    from_zero: bool = False,
) -> "Figure | None":
    """Panels under each other: of each the (metric, label, colour) to draw; panels without data are left out."""
    logged = [[entry for entry in lines if data.series(entry[0])] for lines in panels]
    drawn = [(lines, unit) for lines, unit in zip(logged, units, strict=True) if lines]
    if not drawn:
        return None
    figure, rows = new_figure((1.45,) * len(drawn) if len(drawn) > 1 else (1.9,))
    for axes, (lines, unit) in zip(rows, drawn, strict=True):
        for name, label, color in lines:
            shown = label if len(lines) > 1 else "_"  # matplotlib's name for: not in the legend
            if name in smooth:
                smooth_line(axes, data, data.series(name), color, shown)
            else:
                line(axes, data.series(name), color, shown, marker="")
        axes.set_ylabel(unit)
        axes.yaxis.set_major_formatter(_short_ticks)
        if from_zero:
            axes.set_ylim(bottom=0)
    finish(data, rows)
    return figure


def _per_language(data: RunData, prefix: str) -> list[tuple[int, str, Series]]:
    """Number (which fixes its colour), English name and metric of each language that has the metric."""
    found = [(i, words.language(code), data.series(f"{prefix}{code}")) for i, code in enumerate(data.languages)]
    return [entry for entry in found if entry[2]]


def _short_ticks(value: float, _: float) -> str:
    if value == 0:
        return "0"
    return words.short(value) if abs(value) >= 0.01 else f"{value:.3g}"


def _height_with_legend(tasks: Sequence[str]) -> float:
    """Inches of a panel with a legend of two columns below it."""
    return PANEL_HEIGHT + 0.19 * ((len(tasks) + 2) // 2)


def _one_panel(data: RunData, draw: Draw, height: float = PANEL_HEIGHT) -> "Figure":
    figure, (axes,) = new_figure((height,))
    draw(axes, data)
    finish(data, [axes])
    return figure

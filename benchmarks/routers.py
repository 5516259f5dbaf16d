"""One line and one heat map per router: what runs of configs/experiment/bilingual_router.yaml came to.

    for router in top_k gshard sigmoid_bias; do
        growmoe fit --config configs/experiment/bilingual_router.yaml --config configs/router/$router.yaml \
            --trainer.default_root_dir runs/routers/$router
    done
    python -m benchmarks.routers runs/routers/* --plot docs/images/routers.png
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from app.report.data import RunData, load_run
from app.report.drawing import color_at, drawing_style, line, png_bytes
from app.report.heatmaps import draw_final_map
from app.report.load import read_load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = ("router", "steps", "tokens", "bits per byte", "load CV", "max over ideal", "dead", "dropped")
WINDOW = 20
"""Logged steps at the end of a run that figures are over."""


def main() -> None:
    """Print the table, and draw the picture when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG with curves and heat maps")
    options = parser.parse_args()
    runs = [load_run(folder) for folder in options.run_dirs]
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(row_of(run) for run in runs)]
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    if options.plot is not None:
        options.plot.write_bytes(draw(runs))


def row_of(run: RunData) -> tuple[str, ...]:
    """A run's figures: losses of the last validation, load over the last logged steps."""
    losses = " / ".join(f"{name} {run.series(f'val/bpb_{name}').y[-1]:.3f}" for name in run.languages)
    final = read_load(run).final()
    if final is None:
        raise SystemExit(f"{run.run_dir} has no expert_load.jsonl: give runs of models with experts")
    dead = sum(len(final.dead(layer)) for layer in final.layers)
    dropped = [run.series(f"moe/dropped_{which}").y[-WINDOW:] for which in ("first", "second")]
    shares = " / ".join(f"{statistics.fmean(values):.1%}" for values in dropped if len(values))
    return (
        run.run_dir.name,
        str(run.last_step),
        f"{run.series('data/tokens').y[-1] / 1e6:.2f}M",
        losses,
        f"{final.cv_N.mean():.2f}",
        f"{final.peak_N.max():.2f}",
        f"{dead} of {final.ratios_NE.size}",
        shares or "–",
    )


def draw(runs: Sequence[RunData]) -> bytes:
    """Bits per byte of each language over the run, and the experts' load at its end, as PNG."""
    languages = runs[0].languages
    num_rows = -(-len(languages) // 2) + -(-len(runs) // 2)
    with drawing_style():
        figure, panels = _grid(num_rows)
        for axes, language in zip(panels, languages, strict=False):
            _draw_curves(axes, runs, language)
        for axes, run in zip(panels[len(languages) :], runs, strict=False):
            final = read_load(run).final()
            if final is not None:
                draw_final_map(axes, final)
                axes.set_title(f"{run.run_dir.name}: load against an even share", loc="left")
        for axes in panels[len(languages) + len(runs) :]:
            axes.set_visible(False)
        return png_bytes(figure)


def _grid(num_rows: int) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.3 * num_rows), layout="constrained")
    return figure, list(figure.subplots(num_rows, 2, squeeze=False).flat)


def _draw_curves(axes: "Axes", runs: Sequence[RunData], language: str) -> None:
    for index, run in enumerate(runs):
        line(axes, run.series(f"val/bpb_{language}"), color_at(index), run.run_dir.name)
    axes.set_title(f"bits per byte, {language}", loc="left")
    axes.set_xlabel("tokens")
    axes.legend(fontsize="small")


if __name__ == "__main__":
    main()

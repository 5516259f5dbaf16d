"""What a study writes when it is looked at: study.json, its tables and its picture."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.outputs import check_report
from app.report.document import document, figure_block
from app.report.drawing import drawing_style, png_bytes
from app.study.analysis import Finished, Point, front
from app.study.picture import study_figure
from app.study.study import costs_of
from app.study.tables import Table, mode_table, speed_up_table, step_table
from modules.files import replace_file
from modules.functional.budget import Mode

if TYPE_CHECKING:
    from app.study.study import Study

FORMAT = 1
CAPTION = (
    "by step time; bars are standard deviations over seeds, dashed: the Pareto front; below, where a step's time goes"
)
BESIDE: tuple[Mode, ...] = ("step_time", "tokens", "flops")
"""Modes that are always shown, side by side."""


def write_report(study: "Study") -> list[Path]:
    """Write study.json, study.md, report.html and study.png into the study's folder; returns them.

    What is not there yet is left out. A report.html that somebody else wrote stays, and is an `InputError`.
    """
    page = study.folder / "report.html"
    check_report(page, "output", (".html",))
    study, measurements = study.measured()
    runs = study.runs(measurements)
    results = [(run, run.result) for run in runs]
    finished = Finished(study.arms, study.anchor, costs_of(measurements), [(r, found) for r, found in results if found])
    modes = list(dict.fromkeys([*BESIDE, *study.budget.modes]))
    points = {mode: found for mode in modes if (found := finished.points(mode))}
    record = _record(study, measurements, len(runs), finished, points)
    tables = [mode_table(found, mode) for mode, found in points.items()]
    tables += [step_table(finished, measurements), speed_up_table(finished)]
    with drawing_style():
        figure = study_figure(finished, points, measurements) if points else None
        body = figure_block(figure, "study", "Speed and quality", CAPTION) + "".join(each.to_html() for each in tables)
        files = {
            "study.json": (json.dumps(record, indent=1) + "\n").encode(),
            "study.md": _markdown(study, record, tables).encode(),
            "report.html": document(study.folder.resolve().name, _about(study, record), body).encode(),
            **({} if figure is None else {"study.png": png_bytes(figure)}),
        }
    for name, content in files.items():
        replace_file(study.folder / name, content)
    return [study.folder / name for name in files]


def _record(
    study: "Study", measurements: dict[str, Any], planned: int, finished: Finished, points: dict[Mode, list[Point]]
) -> dict[str, Any]:
    first = next(iter(measurements.values()))
    others = [arm for arm in study.arms if arm.name != study.anchor]
    anchors = {arm.size: finished.costs[arm.key].step_seconds for arm in study.arms if arm.name == study.anchor}
    return {
        "format": FORMAT,
        "machine": first["machine"],
        "versions": first["versions"],
        "anchor": study.anchor,
        "seeds": list(study.seeds),
        "budget": asdict(study.budget),
        "runs_planned": planned,
        "runs_finished": len(finished.runs),
        "measurements": measurements,
        "points": {mode: [asdict(point) for point in found] for mode, found in points.items()},
        "fronts": {
            mode: {quality: [point.key for point in front(found, quality)] for quality in ("bpb", "accuracy")}
            for mode, found in points.items()
            if not found[0].is_from_curves
        },
        "step_time_ratio": {arm.key: finished.costs[arm.key].step_seconds / anchors[arm.size] for arm in others},
        "speed_up": {
            arm.key: {
                "flops": finished.speed_up(arm, "flops"),
                "accelerator_seconds": finished.speed_up(arm, "accelerator_seconds"),
                "flops_on_the_way": _plain(finished.speed_up_on_the_way(arm, "flops")),
                "accelerator_seconds_on_the_way": _plain(finished.speed_up_on_the_way(arm, "accelerator_seconds")),
            }
            for arm in others
        },
        "runs": [result for _, result in finished.runs],
    }


def _markdown(study: "Study", record: dict[str, Any], tables: Sequence[Table]) -> str:
    head = f"# {study.folder.name}\n\n{_about(study, record)}\n\n![{CAPTION}](study.png)\n\n"
    return head + "\n".join(each.to_markdown() for each in tables)


def _about(study: "Study", record: dict[str, Any]) -> str:
    machine, first = record["machine"], next(iter(record["measurements"].values()))
    return (
        f"{record['runs_finished']} of {record['runs_planned']} runs are finished; seeds "
        f"{', '.join(map(str, study.seeds))}. Step times: {machine['devices']} x {machine['device']}; torch "
        f"{record['versions']['torch']}; {first['precision']}; {first['samples_per_step']} x {first['seq_len']} tokens "
        f"a step; MFU of {first['peak']['flops'] / 1e12:.3g} TFLOP/s ({first['peak']['source']})."
    )


def _plain(value: Any) -> Any:
    return None if value is None else asdict(value)

"""The tables of a study."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from app.report import words
from app.report.document import section
from app.report.document import table as html_table
from app.study.analysis import Finished, Point, Spread, front
from callbacks.step_parts import PARTS
from modules.functional.budget import Mode

TITLES: dict[Mode, str] = {
    "step_time": "At equal accelerator time",
    "tokens": "At equal tokens",
    "flops": "At equal training FLOPs",
    "own_chinchilla": "Each at its own compute-optimal tokens",
}
TOLERATED = 0.1
"""share by which the time that runs took may differ from the plan without a word"""
ON_THE_WAY = (
    "No run was made for this: figures are read from the validations of the runs of equal time, at the largest amount "
    "that all arms of a size have passed before their learning rates decay; arms that had not grown to the end by then "
    "are left out. They are higher than those at the end of a run."
)


@dataclass(frozen=True)
class Table:
    """Text in rows and columns, with a title, and words above and below it; a cell that begins with ** is bold."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    above: str = ""

    def to_markdown(self) -> str:
        """For a file that people read as it is."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return "\n\n".join(filter(None, [f"### {self.title}", self.above, table, self.note])) + "\n"

    def to_html(self) -> str:
        """A section of a page."""
        rows = [[_bold(cell) for cell in row] for row in self.rows]
        above = f"<p class=soft>{escape(self.above)}</p>" if self.above else ""
        return section(self.title, above + html_table(self.head, rows, self.note, left=(0, 1)))


def mode_table(points: Sequence[Point], mode: Mode) -> Table:
    """One row for each arm: what it spent and what it came to."""
    languages = sorted({name for point in points for name in point.by_language})
    is_read = points[0].is_from_curves
    head = ["size", "arm", "runs", "step", "steps", "tokens", "FLOPs", "accelerator time", "taken"]
    head += ["bits per byte", "better than the anchor by", *map(words.language, languages), "accuracy"]
    best = set() if is_read else {point.key for point in front(points, "bpb")}
    rows = []
    for point in points:
        bits = spread(point.bpb)
        rows.append(
            [
                point.size,
                point.arm,
                str(point.bpb.count),
                f"{1000 * point.step_s:.4g} ms",
                f"{point.steps:,.0f}",
                words.short(point.tokens),
                f"{point.flops:.3g}",
                words.duration(point.accelerator_seconds),
                words.duration(point.taken),
                f"**{bits}**" if point.key in best else bits,
                "–" if point.bpb_less is None else spread(point.bpb_less, sign=True),
                *(spread(point.by_language.get(name)) for name in languages),
                "–" if point.accuracy is None else spread(point.accuracy, 100, 1) + " %",
            ]
        )
    note = "± is the standard deviation over seeds."
    if is_read:
        return Table(TITLES[mode], head, rows, note, ON_THE_WAY)
    note += (
        " Accelerator time is planned, by the measured step times; taken is what the steps took while the study ran. "
        "Accuracy is over the tasks that all runs have."
    )
    off = [point for point in points if point.taken and abs(point.taken / point.accelerator_seconds - 1) > TOLERATED]
    if off:
        told = ", ".join(
            f"{point.key} {point.taken / point.accelerator_seconds:.2f} times" for point in off if point.taken
        )
        note += (
            f" Time taken is not what was planned ({told}): the machine did other work while steps were measured "
            "or runs trained. If while they were measured, times are not equal here: measure more rounds on a quiet "
            "one, in a new folder."
        )
    bold = "Bold: no arm is both faster and better (the Pareto front by step time and bits per byte). "
    return Table(TITLES[mode], head, rows, bold + note)


def step_table(finished: Finished, measurements: Mapping[str, Any]) -> Table:
    """What a step of each arm's last model takes, and over the anchor's, part by part."""
    anchors = {arm.size: measurements[arm.key]["stages"][-1] for arm in finished.arms if arm.name == finished.anchor}
    present = {
        part
        for record in measurements.values()
        for stage in record["stages"]
        for part, s in stage["parts_s"].items()
        if s
    }
    parts = [part for part in ("input", *PARTS) if part in present]
    head = ["size", "arm", "parameters", "active", "step (quartiles)", "over the anchor's", "tokens/s", "MFU", "memory"]
    head += [f"{part}, ms" for part in parts]
    rows = []
    for arm in finished.arms:
        stage = measurements[arm.key]["stages"][-1]
        low, high = (f"{1000 * value:.4g}" for value in stage["step_s_quartiles"])
        count = stage["parameters"]
        rows.append(
            [
                arm.size,
                arm.name,
                words.short(count["total"]),
                words.short(count["active"]),
                f"{1000 * stage['step_s']:.4g} ms ({low} to {high})",
                f"{stage['step_s'] / anchors[arm.size]['step_s']:.3f}",
                f"{stage['tokens_per_s']:,.0f}",
                f"{stage['mfu']:.1%}",
                f"{stage['peak_mib']:,.0f} MiB",
                *(f"{1000 * stage['parts_s'].get(part, 0.0):.3g}" for part in parts),
            ]
        )
    note = "Parts were clocked in steps of their own, and scaled to the median. MFU counts empty slots of a capacity."
    return Table("Step time", head, rows, note)


def speed_up_table(finished: Finished) -> Table:
    """How many times the compute or the time of a dense model an arm is worth."""
    head = ["size", "arm", "FLOPs", "accelerator time", "FLOPs, on the way", "accelerator time, on the way"]
    rows: list[list[str]] = []
    reasons: dict[str, list[str]] = {}
    for arm in finished.arms:
        if arm.name == finished.anchor:
            continue
        across = [finished.speed_up(arm, "flops"), finished.speed_up(arm, "accelerator_seconds")]
        for reason in {value for value in across if isinstance(value, str)}:
            reasons.setdefault(reason, []).append(arm.key)
        shown = ["–" if isinstance(value, str) else f"{value:.2f}" for value in across]
        shown += [
            spread(finished.speed_up_on_the_way(arm, unit), digits=2) for unit in ("flops", "accelerator_seconds")
        ]
        rows.append([arm.size, arm.name, *shown])
    note = (
        "What the dense anchor needs to the same loss, over what the arm has spent: above 1 the arm is ahead. The "
        "first two columns go between the anchors of all sizes at the end of their budgets (Artetxe et al.; log-log, "
        "no extrapolation), the last two along the curve of the anchor of the same size, before learning rates decay, "
        "at the last validation of the arm, grown to the end, whose loss the anchor has had, too. "
    )
    told = " ".join(f"No figure for {', '.join(keys)}: {reason}." for reason, keys in reasons.items())
    return Table("Speed-up factors", head, rows, note + told)


def spread(value: Spread | None, scale: float = 1.0, digits: int = 3, sign: bool = False) -> str:
    """Mean ± standard deviation, a dash for nothing."""
    if value is None:
        return "–"
    mean = f"{scale * value.mean:{'+' if sign else ''}.{digits}f}"
    return mean if value.deviation is None else f"{mean} ± {scale * value.deviation:.{digits}f}"


def _bold(cell: str) -> str:
    text = escape(cell)
    return f"<b>{text.strip('*')}</b>" if text.startswith("**") else text

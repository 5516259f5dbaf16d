"""What the arms of the growth study came to: tables and a picture, from their logs.

Losses of different arms are compared where all have the same, constant learning rate; the decay at the end of an arm is
left out of its curve, and told apart. Validation losses are averaged over three validations.
"""

import csv
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.growth_arms import Arm, Plan, all_arms

LOSSES = {"all": "val/loss", "English": "val/bpb_en", "Chinese": "val/bpb_zh"}
"""Nats per token over both languages, and bits per byte of each."""
SMOOTHED = 3


@dataclass(frozen=True)
class Point:
    """An arm at a validation: steps of its source, its own steps, the seconds of both, and the losses."""

    source_steps: int
    own_steps: int
    source_seconds: float
    own_seconds: float
    losses: dict[str, float]

    def spent(self, unit: str, is_counted: bool) -> float:
        """Steps or seconds, with or without the source's."""
        own, source = (
            (self.own_steps, self.source_steps) if unit == "tokens" else (self.own_seconds, self.source_seconds)
        )
        return own + source if is_counted else own


Row = list[float]
"""A validation: step, and the losses in the order of `LOSSES`."""


@dataclass
class Record:
    """What is kept of a study.

    Attributes:
        step_seconds: what a step of each architecture takes.
        arms: the validations of finished arms, by seed and name.
    """

    step_seconds: dict[str, float]
    arms: dict[str, dict[str, list[Row]]]


def read_record(path: Path | None, plan: Plan) -> Record:
    """The record in a file, or an empty one; that of another plan is refused."""
    if path is None or not path.exists():
        return Record({}, {})
    kept = json.loads(path.read_text())
    if kept["plan"] != vars(plan):
        sys.exit(f"{path} is the record of a study with {kept['plan']}, not {vars(plan)}; give another file")
    return Record(kept["step_seconds"], kept["arms"])


def write_record(path: Path, study: "Study") -> None:
    """Keep all arms that are finished, those of the former record included; one line for each arm."""
    arms = study.record.arms
    for seed in study.seeds:
        for arm in all_arms().values():
            if study.is_finished(arm, seed):
                arms.setdefault(str(seed), {})[arm.name] = study.rows(arm, seed)
    lines = [
        f"  {json.dumps(seed)}: {{\n"
        + ",\n".join(f"   {json.dumps(name)}: {json.dumps(rows)}" for name, rows in sorted(by_name.items()))
        + "\n  }"
        for seed, by_name in sorted(arms.items())
    ]
    head = f'{{\n "plan": {json.dumps(vars(study.plan))},\n "step_seconds": {json.dumps(study.record.step_seconds)},\n'
    aside = path.with_suffix(".tmp")
    aside.write_text(head + ' "arms": {\n' + ",\n".join(lines) + "\n }\n}\n")
    aside.replace(path)


@dataclass(frozen=True)
class Study:
    """Where the runs are, and what is known of those that are not there any more."""

    plan: Plan
    folder: Path
    seeds: Sequence[int]
    record: Record

    @property
    def step_seconds(self) -> dict[str, float]:
        """What a step of each architecture takes."""
        return self.record.step_seconds

    def is_finished(self, arm: Arm, seed: int) -> bool:
        """Whether the arm has come to its end."""
        there = arm.checkpoint(arm.num_steps(self.plan), seed, self.folder).is_dir()
        return there or arm.name in self.record.arms.get(str(seed), {})

    def rows(self, arm: Arm, seed: int) -> list[Row]:
        """Its validations, from its run's log where that is there."""
        log = arm.folder(seed, self.folder) / "metrics.csv"
        if not log.exists():
            return self.record.arms[str(seed)][arm.name]
        with log.open(newline="") as file:
            measured = [row for row in csv.DictReader(file) if row.get("val/loss")]
        return [[int(row["step"]), *(round(float(row[name]), 6) for name in LOSSES.values())] for row in measured]

    def points(self, arm: Arm, seed: int) -> list[Point]:
        """All validations of an arm, its source's before it left it excluded."""
        begin = self.plan.grow_at if arm.source else 0
        source = self.step_seconds[key(arm.start)] * begin
        own = self.step_seconds[key(arm.end)]
        points = []
        for step, *measured in self.rows(arm, seed):
            if step > begin:
                losses = dict(zip(LOSSES, measured, strict=True))
                points.append(Point(begin, int(step) - begin, source, (step - begin) * own, losses))
        return points

    def curve(self, arm: Arm, seed: int) -> list[Point]:
        """The validations at the constant learning rate, each the mean of three, at the middle one's place."""
        end = arm.num_steps(self.plan) - self.plan.decay
        points = [point for point in self.points(arm, seed) if point.source_steps + point.own_steps <= end]
        smooth = []
        for place in range(len(points) - SMOOTHED + 1):
            window = points[place : place + SMOOTHED]
            losses = {name: statistics.mean(point.losses[name] for point in window) for name in LOSSES}
            middle = window[SMOOTHED // 2]
            spent = middle.source_steps, middle.own_steps, middle.source_seconds, middle.own_seconds
            smooth.append(Point(*spent, losses))
        return smooth


def key(architecture: dict[str, Any]) -> str:
    """The name of an architecture in tables."""
    moe = architecture.get("moe")
    experts = f", {moe['num_experts']} experts top-{moe['top_k']}" if moe else ""
    return f"{architecture['dim']} wide, {architecture['num_layers']} layers{experts}"


def reached(curve: Sequence[Point], loss: str, wanted: float, unit: str, is_counted: bool) -> float | None:
    """What is spent when a curve is first at or below a loss, between two validations linearly."""
    for before, after in pairwise(curve):
        if after.losses[loss] <= wanted:
            high, low = before.losses[loss], after.losses[loss]
            share = 0.0 if high <= wanted else (high - wanted) / (high - low)
            first, last = before.spent(unit, is_counted), after.spent(unit, is_counted)
            return first + (last - first) * share
    return None


def loss_at(curve: Sequence[Point], seconds: float) -> float:
    """The loss over both languages after so many seconds, the source's counted."""
    for before, after in pairwise(curve):
        first, last = before.spent("seconds", True), after.spent("seconds", True)
        if first <= seconds <= last:
            share = (seconds - first) / (last - first)
            return before.losses["all"] + share * (after.losses["all"] - before.losses["all"])
    raise ValueError(f"{seconds} seconds are beyond the curve")


def report(study: Study, arms: Sequence[Arm]) -> None:
    """Tables of the finished arms: dense ones and mixtures against their own kind from scratch, then by language."""
    print("Seconds of a step:", "; ".join(f"{name}: {value:.3f}" for name, value in study.step_seconds.items()), "\n")
    for rival in (arm for arm in all_arms().values() if arm.length == "steps"):
        of_kind = [arm for arm in arms if arm.rival == rival.name]
        _table(f"against {rival.name}", HEADER, [_row(study, arm, rival) for arm in of_kind])
        _table(f"by language, against {rival.name}", BY_LANGUAGE, [_language_row(study, arm, rival) for arm in of_kind])


HEADER = (
    "arm",
    "seeds",
    "its loss less scratch's, after as many seconds",
    "tokens to its loss",
    "with the source's",
    "seconds to it",
    "with the source's",
    "loss behind the decay (steps)",
)
BY_LANGUAGE = ("arm", *(f"{name}: {what}" for name in ("English", "Chinese") for what in ("tokens", "seconds")))


def _row(study: Study, arm: Arm, rival: Arm) -> list[str] | None:
    """An arm's cells: what it spends as a share of what its rival did up to the end of the constant rate."""
    seeds = _seeds(study, arm, rival)
    if not seeds:
        return None
    gaps, shares, finals = [], {(unit, counted): [] for unit, counted in _WAYS}, []
    for seed in seeds:
        curve, theirs = study.curve(arm, seed), study.curve(rival, seed)
        end = theirs[-1]
        seconds = min(end.spent("seconds", True), curve[-1].spent("seconds", True))
        gaps.append(loss_at(curve, seconds) - loss_at(theirs, seconds))
        finals.append(study.points(arm, seed)[-1].losses["all"])
        for unit, counted in _WAYS:
            spent = reached(curve, "all", end.losses["all"], unit, counted)
            shares[unit, counted].append(None if spent is None else spent / end.spent(unit, True))
    steps = arm.num_steps(study.plan)
    cells = [_spread(shares[way], 2) for way in _WAYS]
    return [arm.name, str(len(seeds)), _spread(gaps, 3), *cells, f"{_spread(finals, 3)} ({steps:,})"]


_WAYS = (("tokens", False), ("tokens", True), ("seconds", False), ("seconds", True))


def _language_row(study: Study, arm: Arm, rival: Arm) -> list[str] | None:
    """Tokens (the source free) and seconds (the source counted) to the rival's bits per byte in each language."""
    seeds = _seeds(study, arm, rival)
    cells = []
    for language in ("English", "Chinese"):
        for unit, counted in (("tokens", False), ("seconds", True)):
            shares = []
            for seed in seeds:
                end = study.curve(rival, seed)[-1]
                spent = reached(study.curve(arm, seed), language, end.losses[language], unit, counted)
                shares.append(None if spent is None else spent / end.spent(unit, True))
            cells.append(_spread(shares, 2))
    return [arm.name, *cells] if seeds else None


def _seeds(study: Study, arm: Arm, rival: Arm) -> list[int]:
    """Those for which both have come to their ends."""
    return [seed for seed in study.seeds if study.is_finished(arm, seed) and study.is_finished(rival, seed)]


def _spread(values: Sequence[float | None], digits: int) -> str:
    """Mean and standard deviation; how many of the seeds got there, when not all did."""
    found = [value for value in values if value is not None]
    if not found:
        return "–"
    deviation = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    some = f" ({len(found)} of {len(values)})" if len(found) < len(values) else ""
    return f"{statistics.mean(found):.{digits}f}{deviation}{some}"


def _table(title: str, header: Sequence[str], rows: Sequence[list[str] | None]) -> None:
    print(f"**{title}**\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        if row is not None:
            print(f"| {' | '.join(row)} |")
    print()


def draw(study: Study, path: Path) -> None:
    """Loss against seconds, the source's counted: dense arms and mixtures, means over the seeds that have both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rivals = [arm for arm in all_arms().values() if arm.length == "steps"]
    figure, axes = pyplot.subplots(1, len(rivals), figsize=(6.5 * len(rivals), 5))
    for axis, rival in zip(axes, rivals, strict=True):
        for arm in (arm for arm in all_arms().values() if arm.rival == rival.name):
            curves = [study.curve(arm, seed) for seed in _seeds(study, arm, rival)]
            if not curves:
                continue
            places = list(zip(*curves, strict=False))
            seconds = [points[0].spent("seconds", True) for points in places]
            losses = [statistics.mean(point.losses["all"] for point in points) for points in places]
            plain = arm.source is None or arm.stage is None
            axis.plot(seconds, losses, "--" if plain else "-", label=arm.name, linewidth=1.8 if plain else 1.1)
        axis.set_xlabel("seconds of one core, the source's counted")
        axis.set_ylabel("validation loss, nats per token")
        axis.grid(True, alpha=0.3)
        axis.legend(fontsize="x-small")
        axis.set_title(f"against {rival.name}")
        lowest = min(min(line.get_ydata()) for line in axis.get_lines())
        axis.set_ylim(lowest - 0.02, lowest + 1.0)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")

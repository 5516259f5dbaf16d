"""What the runs of a study say: means over seeds, differences from the anchor, fronts, and speed-up factors."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from app.laws.fairseq import speed_up
from app.study.design import Arm, option
from app.study.running import Run
from modules.errors import InputError
from modules.functional.budget import Mode, RunCost
from modules.functional.schedule import ScheduleConfig

Quality = Literal["bpb", "accuracy"]
Unit = Literal["flops", "accelerator_seconds"]


@dataclass(frozen=True)
class Spread:
    """Of a figure over seeds: mean, standard deviation (None of one), and how many."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of one or more values."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))


@dataclass(frozen=True)
class Point:
    """An arm under a mode of the budget.

    Attributes:
        step_s: seconds of a step of the model that it ends with.
        steps, tokens, accelerator_seconds, flops: of a run, as planned.
        taken: accelerator-seconds that steps took while it was trained; None where that is not known.
        bpb: bits per byte, mean over languages.
        bpb_less: those of the anchor with the same seed, less these: what the arm is better by.
        by_language: bits per byte of each language.
        accuracy: mean over the tasks that all finished runs have; None where there are none.
        is_from_curves: read from runs of another mode, before their learning rate decays.
    """

    size: str
    arm: str
    step_s: float
    steps: float
    tokens: float
    accelerator_seconds: float
    flops: float
    taken: float | None
    bpb: Spread
    bpb_less: Spread | None
    loss: Spread
    by_language: dict[str, Spread]
    accuracy: Spread | None
    is_from_curves: bool = False

    @property
    def key(self) -> str:
        """That of the arm."""
        return f"{self.size}-{self.arm}"


@dataclass(frozen=True)
class Finished:
    """The finished runs of a study, and what their steps cost."""

    arms: Sequence[Arm]
    anchor: str
    costs: Mapping[str, RunCost]
    runs: Sequence[tuple[Run, dict[str, Any]]]

    def points(self, mode: Mode) -> list[Point]:
        """Every arm with a finished run of the mode; where no run has it, those of equal time, on the way, at equal
        tokens or FLOPs."""
        found = {arm.key: self._results(arm.key, mode) for arm in self.arms}
        if not any(found.values()) and mode in ("tokens", "flops"):
            return self._points_on_the_way(mode)
        return [self._point(arm, found) for arm in self.arms if found[arm.key]]

    @cached_property
    def _tasks(self) -> set[str]:
        """Those that all finished runs have results of: only these can be compared."""
        return set.intersection(*(set(result["tasks"]) for _, result in self.runs)) if self.runs else set()

    def _accuracy(self, result: Mapping[str, Any]) -> float:
        return statistics.fmean(result["tasks"][task]["value"] for task in self._tasks)

    def _results(self, key: str, mode: Mode) -> list[dict[str, Any]]:
        return [result for run, result in self.runs if run.arm.key == key and mode in run.modes]

    def _point(self, arm: Arm, found: Mapping[str, list[dict[str, Any]]], is_from_curves: bool = False) -> Point:
        results = found[arm.key]
        anchors = {each["seed"]: each for each in found.get(f"{arm.size}-{self.anchor}", [])}
        less = [anchors[each["seed"]]["bpb"] - each["bpb"] for each in results if each["seed"] in anchors]
        accuracies = [self._accuracy(each) for each in results if self._tasks] if not is_from_curves else []
        taken = [each["accelerator_seconds_taken"] for each in results if each.get("accelerator_seconds_taken")]
        spent = {
            name: statistics.fmean(each[name] for each in results)
            for name in ("steps", "tokens", "accelerator_seconds", "flops")
        }
        languages = results[0].get("bpb_by_language", {})
        return Point(
            size=arm.size,
            arm=arm.name,
            step_s=self.costs[arm.key].step_seconds,
            **spent,
            taken=statistics.fmean(taken) if taken else None,
            bpb=Spread.of([each["bpb"] for each in results]),
            bpb_less=Spread.of(less) if less and arm.name != self.anchor else None,
            loss=Spread.of([each["loss"] for each in results]),
            by_language={name: Spread.of([each["bpb_by_language"][name] for each in results]) for name in languages},
            accuracy=Spread.of(accuracies) if accuracies else None,
            is_from_curves=is_from_curves,
        )

    def _points_on_the_way(self, unit: Literal["tokens", "flops"]) -> list[Point]:
        """At the largest amount that all arms of a size, with all their seeds, have passed before any decay; without
        those that have not become by then what they end as."""
        points = []
        for size in dict.fromkeys(arm.size for arm in self.arms):
            arms = [arm for arm in self.arms if arm.size == size]
            curves = {arm.key: self._curves(arm) for arm in arms}
            stable = [curve[unit] for of_arm in curves.values() for curve in of_arm.values()]
            if not stable or min(ends := [amounts[-1] if amounts else 0.0 for amounts in stable]) <= 0:
                continue
            read = {
                key: [
                    _at(curve, unit, min(ends)) | {"seed": seed}
                    for seed, curve in of_arm.items()
                    if _holds(curve, unit, ends)
                ]
                for key, of_arm in curves.items()
            }
            points += [self._point(arm, read, is_from_curves=True) for arm in arms if read[arm.key]]
        return points

    def _curves(self, arm: Arm) -> dict[int, dict[str, list[float]]]:
        """By seed, the validations between the last growth and the decay, of the runs of equal time."""
        found = {}
        for result in self._results(arm.key, "step_time"):
            grown = self.costs[arm.key].stages[-1].begins(result["steps"], self.costs[arm.key].tokens_per_step)
            curve = self.stable_curve(arm, result)
            first = sum(step < grown for step in curve["steps"])
            found[result["seed"]] = {name: values[first:] for name, values in curve.items()}
        return found

    def stable_curve(self, arm: Arm, result: Mapping[str, Any]) -> dict[str, list[float]]:
        """The validations of a run before its learning rate decays."""
        schedule = ScheduleConfig(**(option(arm.options, "model.init_args.schedule") or {}))
        share = {"wsd": 1 - schedule.decay_fraction, "cosine": 0.0, "constant": 1.0}[schedule.kind]
        curve = result["curve"]
        count = sum(step <= share * result["steps"] for step in curve["steps"])
        return {name: values[:count] for name, values in curve.items()}

    def speed_up(self, arm: Arm, unit: Unit) -> float | str:
        """How many times what an arm has spent its dense anchors would, to the same loss; or why that is not known.

        Between the anchors of all sizes, each at the end of its own budget, as in fairseq's paper.
        """
        dense = [point for point in self.points("step_time") if point.arm == self.anchor]
        mine = next((point for point in self.points("step_time") if point.key == arm.key), None)
        if mine is None:
            return "no run of equal time is finished"
        try:
            return speed_up(
                [(getattr(each, unit), each.loss.mean) for each in dense], getattr(mine, unit), mine.loss.mean
            )
        except InputError as error:
            return str(error)

    def speed_up_on_the_way(self, arm: Arm, unit: Unit) -> Spread | None:
        """The same against the curve of the anchor of its own size, both before their learning rates decay: what the
        anchor had spent when it came to the arm's loss. None where it never did, or nothing can be compared."""
        anchor = next(each for each in self.arms if each.size == arm.size and each.name == self.anchor)
        theirs, found = self._curves(anchor), []
        for seed, curve in self._curves(arm).items():
            factor = _factor(theirs.get(seed), curve, unit)
            if factor is None:
                return None
            found.append(factor)
        return Spread.of(found) if found else None


def front(points: Sequence[Point], quality: Quality) -> list[Point]:
    """Those for which no other one is both as fast and better, by step time: the Pareto front."""
    chosen: list[Point] = []
    for point in sorted(
        (p for p in points if _score(p, quality) is not None), key=lambda p: (p.step_s, _score(p, quality))
    ):
        if not chosen or _score(point, quality) < _score(chosen[-1], quality):  # type: ignore[operator]
            chosen.append(point)
    return chosen


def _score(point: Point, quality: Quality) -> float | None:
    """Lower is better."""
    if quality == "bpb":
        return point.bpb.mean
    return None if point.accuracy is None else -point.accuracy.mean


def _at(curve: Mapping[str, Sequence[float]], unit: str, amount: float) -> dict[str, float]:
    """All values of a curve where so much has been spent, between two validations."""
    return {name: float(np.interp(amount, curve[unit], values)) for name, values in curve.items()}


def _factor(
    theirs: Mapping[str, Sequence[float]] | None, mine: Mapping[str, Sequence[float]], unit: Unit
) -> float | None:
    """At the loss of the last validation of an arm, or of the last one before it that the anchor has reached."""
    if theirs is None or len(theirs["loss"]) < 2:
        return None
    better = [n for n, loss in enumerate(theirs["loss"]) if loss < min([*theirs["loss"][:n], np.inf])]
    losses, reached = ([theirs[name][n] for n in better] for name in ("loss", unit))
    for loss, spent in reversed(list(zip(mine["loss"], mine[unit], strict=True))):
        if losses[-1] <= loss <= losses[0]:
            return float(np.exp(np.interp(-loss, np.negative(losses), np.log(reached))) / spent)
    return None


def _holds(curve: Mapping[str, Sequence[float]], unit: str, ends: Sequence[float]) -> bool:
    """Whether a curve has begun where the shortest one ends."""
    return bool(curve[unit]) and curve[unit][0] <= min(ends)

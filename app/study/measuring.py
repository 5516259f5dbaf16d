"""Step times of all arms of a study, measured in turn on one machine."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from app.measurement import read_measurement
from app.study.children import ChildFailed, run_command
from app.study.design import Arm, Measuring, to_yaml
from app.study.locking import held
from modules.errors import InputError
from modules.files import replace_file

SAME = ("machine", "versions")
"""What all records of a study must have in common."""


def measure_arms(
    arms: Sequence[Arm], folder: Path, how: Measuring, tell: Callable[[str], None], launcher: str = ""
) -> dict[str, dict[str, Any]]:
    """The measurement of every arm by its key; those that are there are not made again.

    Rounds go over all arms in turn, so that a machine that slows down or is shared treats them alike.

    Raises:
        InputError: options that `fit` would refuse; arms measured on different machines or versions.
    """
    with held(folder / "measuring.lock", lambda: tell("waiting for another process, which measures")):
        for number in range(how.rounds):
            for arm in arms:
                if not record_path(folder, arm, number).exists():
                    tell(f"measuring {arm.key}, round {number + 1} of {how.rounds}")
                    _measure(arm, folder, number, how, launcher)
    return read_arms(arms, folder)


def read_arms(arms: Sequence[Arm], folder: Path) -> dict[str, dict[str, Any]]:
    """The measurements that are there, by the key of the arm, each of all its rounds."""
    records = {arm.key: [read_measurement(path) for path in sorted(folder.glob(f"{arm.key}-*.json"))] for arm in arms}
    check_alike([record for of_arm in records.values() for record in of_arm])
    return {key: combined(of_arm) for key, of_arm in records.items() if of_arm}


def _measure(arm: Arm, folder: Path, number: int, how: Measuring, launcher: str) -> None:
    config = folder / f"{arm.key}.yaml"
    replace_file(config, to_yaml(arm.configuration()).encode())
    flags = {"warmup": how.warmup, "steps": how.steps, "parts": how.parts if number == 0 else 0}
    words = [word for name, value in flags.items() for word in (f"--measure.{name}", str(value))]
    unchecked = folder / f"{arm.key}.unchecked"
    unchecked.unlink(missing_ok=True)
    try:
        command = ["measure", "--config", str(config), *words, "--output", str(unchecked)]
        run_command(command, folder / f"{arm.key}.log", launcher)
        check_alike([read_measurement(path) for path in (*sorted(folder.glob("*.json")), unchecked)])
    except (InputError, ChildFailed) as error:
        raise type(error)(f"{arm.key}: {error}") from None
    unchecked.rename(record_path(folder, arm, number))


def check_alike(records: Sequence[dict[str, Any]]) -> None:
    """Raise `InputError` for records of different machines or versions: their times say nothing about the models."""
    for record in records[1:]:
        for name in SAME:
            first, other = records[0][name], record[name]
            if first != other:
                differing = [key for key in {**first, **other} if first.get(key) != other.get(key)]
                told = "; ".join(f"{key} {first.get(key)!r} and {other.get(key)!r}" for key in differing)
                raise InputError(
                    f"step times of this study are of different {name}: {told}; they are not compared: go on "
                    "with the machine and the versions of the first ones, or begin a study in a new folder"
                )


def combined(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record of several: the steps of all rounds, and what follows from their median."""
    record = dict(rounds[0])
    record["peak"] = max((each["peak"] for each in rounds), key=lambda peak: peak["flops"])
    record["stages"] = [
        _combined_stage(stages, record) for stages in zip(*(each["stages"] for each in rounds), strict=True)
    ]
    return record


def _combined_stage(stages: Sequence[dict[str, Any]], record: dict[str, Any]) -> dict[str, Any]:
    steps = [seconds for stage in stages for seconds in stage["steps_s"]]
    median = statistics.median(steps)
    low, high = np.percentile(steps, (25, 75))
    return {
        **stages[0],
        "steps_s": steps,
        "step_s": median,
        "step_s_quartiles": [float(low), float(high)],
        "wait_s": statistics.median(stage["wait_s"] for stage in stages),
        "tokens_per_s": record["tokens_per_step"] / median,
        "mfu": stages[0]["flops_per_token"] * record["tokens_per_step"] / median / _peak_flops(record),
        "peak_mib": max(stage["peak_mib"] for stage in stages),
        "parts_s": {part: seconds * median / stages[0]["step_s"] for part, seconds in stages[0]["parts_s"].items()},
        "transition_s": statistics.median(stage["transition_s"] for stage in stages),
    }


def _peak_flops(record: dict[str, Any]) -> float:
    """Of all devices."""
    return float(record["machine"]["devices"] * record["peak"]["flops"])


def record_path(folder: Path, arm: Arm, number: int) -> Path:
    """Where the measurement of an arm in a round lies."""
    return folder / f"{arm.key}-{number}.json"

"""A study on the disk: its design, its measurements and its runs.

folder/
    design.json       what is compared; a folder belongs to one design, to which seeds and arms may be added
    measure/          step times, one record for each arm and round
    runs/ARM/         for every run its configuration, log and run directory, with result.json when it is finished
    study.json        everything that the tables and the picture show
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.study.budget import ArmCost
from app.study.design import Arm, ArmOptions, Measuring, Options, StudyBudget, make_arms
from app.study.measuring import measure_arms
from app.study.running import Run, make_runs, plan_runs
from modules.errors import InputError
from modules.files import replace_file

DESIGN = "design.json"


@dataclass(frozen=True)
class Study:
    """What is compared, and where it lies."""

    folder: Path
    arms: Sequence[Arm]
    anchor: str
    seeds: Sequence[int]
    budget: StudyBudget
    measuring: Measuring

    @classmethod
    def open(
        cls,
        folder: Path,
        common: Options,
        sizes: Mapping[str, Options],
        arms: Mapping[str, ArmOptions],
        anchor: str,
        seeds: Sequence[int],
        budget: StudyBudget,
        measuring: Measuring,
    ) -> "Study":
        """Begin a study in a folder, or go on with the one that is there.

        Raises:
            InputError: the folder holds another study, or something else.
        """
        if not seeds or len(set(seeds)) != len(seeds):
            raise InputError(f"seeds={list(seeds)} must name at least one seed, each once")
        study = cls(folder, make_arms(common, sizes, arms, anchor), anchor, seeds, budget, measuring)
        study._claim()
        return study

    @property
    def is_measured(self) -> bool:
        """Whether the step times of all arms are there."""
        rounds = range(self.measuring.rounds)
        return all((self.folder / "measure" / f"{arm.key}-{n}.json").exists() for arm in self.arms for n in rounds)

    def measurements(self, tell: Callable[[str], None] = lambda text: None, launcher: str = "") -> dict[str, Any]:
        """The record of every arm by its key; what is missing is measured."""
        return measure_arms(self.arms, self.folder / "measure", self.measuring, tell, launcher)

    def runs(self, measurements: Mapping[str, Any]) -> list[Run]:
        """All runs, finished or not."""
        costs = costs_of(measurements)
        return plan_runs(self.arms, costs, self.anchor, self.budget, self.seeds, self.folder / "runs")

    def work(self, tell: Callable[[str], None], launcher: str = "", only: str | None = None) -> list[str]:
        """Do everything that is not done yet; returns what failed."""
        measurements = self.measurements(tell, launcher)
        runs = self.runs(measurements)
        chosen = [run for run in runs if only is None or only in f"{run.arm.key} seed-{run.seed}"]
        if not chosen:
            raise InputError(
                f"only={only} is in the name of no arm ({', '.join(arm.key for arm in self.arms)}) or seed-N"
            )
        return make_runs(chosen, costs_of(measurements), tell, launcher)

    def _claim(self) -> None:
        """Note the design in the folder; refuse one that holds something else, or other arms of the same names."""
        path = self.folder / DESIGN
        arms = {arm.key: arm.options for arm in self.arms}
        fixed = {
            "anchor": self.anchor,
            **{name: value for name, value in asdict(self.budget).items() if name != "modes"},
        }
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name, value in fixed.items() if known["fixed"].get(name) != value]
            changed += [key for key, options in arms.items() if known["arms"].get(key, options) != options]
            if changed:
                raise InputError(
                    f"folder={self.folder} holds a study in which {changed[0]} is another one; give a new folder, or go "
                    "on with the configuration of that study (arms, seeds and modes may be added)"
                )
            arms = known["arms"] | arms
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise InputError(f"folder={self.folder} holds something else than a study; give a new folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps({"fixed": fixed, "arms": arms}, indent=1) + "\n").encode())


def costs_of(measurements: Mapping[str, Any]) -> dict[str, ArmCost]:
    """What the steps of every arm cost, by its key."""
    return {key: ArmCost.of(record) for key, record in measurements.items()}

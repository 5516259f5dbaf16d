"""A study on the disk: its design, its measurements and its runs.

folder/
    design.json       what is compared; a folder belongs to one design, to which arms, seeds and modes may be added
    measure/          step times, one record for each arm and round
    runs/ARM/         for every run its configuration, log and run directory, with result.json when it is finished
    study.json        everything that the tables and the picture show
    study.md, study.png, report.html
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from app.study.budget import cost_of
from app.study.design import Arm, Keep, Measuring, StudyBudget
from app.study.measuring import measure_arms, record_path
from app.study.running import Run, make_runs, plan_runs, planned
from modules.errors import InputError
from modules.files import replace_file
from modules.functional.budget import RunCost

DESIGN = "design.json"


@dataclass(frozen=True)
class Study:
    """What is compared, and where it lies.

    Attributes:
        arms: anchors before the other arms of their size.
        anchor: the name of the arm that sets the budget of its size.
        keep: which checkpoints of finished runs stay.
    """

    folder: Path
    arms: Sequence[Arm]
    anchor: str
    seeds: Sequence[int]
    budget: StudyBudget
    measuring: Measuring
    keep: Keep = "last"

    @classmethod
    def read(cls, folder: Path) -> "Study":
        """The study of a folder; raises `InputError` where there is none."""
        path = folder / DESIGN
        if not path.is_file():
            raise InputError(f"{folder} holds no study; begin one with growmoe compare -c FILE --folder {folder}")
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                folder,
                [Arm(**arm) for arm in known["arms"]],
                known["anchor"],
                known["seeds"],
                StudyBudget(**known["budget"]),
                Measuring(**known["measure"]),
                known["keep"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read as a study's design ({error}); give another folder") from None

    def begin(self) -> "Study":
        """Note the design in the folder, with what is there already; returns both together.

        Raises:
            InputError: the folder holds something else, or a study with another budget, anchor, or other arms of the
                same names.
        """
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError(f"seeds={list(self.seeds)} must name at least one seed, each once; 0 and 1 are usual")
        study = self
        if (self.folder / DESIGN).exists():
            study = self._with(Study.read(self.folder))
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise InputError(f"folder={self.folder} holds something else than a study; give a new folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        design = {
            "anchor": study.anchor,
            "seeds": list(study.seeds),
            "budget": asdict(study.budget),
            "measure": asdict(study.measuring),
            "keep": study.keep,
            "arms": [asdict(arm) for arm in study.arms],
        }
        replace_file(self.folder / DESIGN, (json.dumps(design, indent=1) + "\n").encode())
        return study

    def _with(self, known: "Study") -> "Study":
        """This one, with the arms, seeds and modes of one that lies in the same folder."""
        ours, theirs = ({arm.key: arm for arm in study.arms} for study in (self, known))
        changed = [key for key in ours if key in theirs and ours[key] != theirs[key]]
        changed += ["anchor"] if self.anchor != known.anchor else []
        changed += ["budget"] if replace(self.budget, modes=known.budget.modes) != known.budget else []
        if changed:
            raise InputError(
                f"folder={self.folder} holds a study in which {changed[0]} is another one; give a new folder, or the "
                "configuration of that study (arms, seeds and modes may be added)"
            )
        return replace(
            self,
            arms=[*known.arms, *(arm for key, arm in ours.items() if key not in theirs)],
            seeds=list(dict.fromkeys([*known.seeds, *self.seeds])),
            budget=replace(self.budget, modes=list(dict.fromkeys([*known.budget.modes, *self.budget.modes]))),
        )

    @property
    def is_measured(self) -> bool:
        """Whether the step times of all arms are there."""
        rounds = range(self.measuring.rounds)
        return all(record_path(self.folder / "measure", arm, number).exists() for arm in self.arms for number in rounds)

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
            names = ", ".join(arm.key for arm in self.arms)
            raise InputError(f"only={only} is in the name of no run; choose a part of {names}, or seed-N")
        costs = costs_of(measurements)
        for line in planned(runs, costs):
            tell(line)
        return make_runs(chosen, costs, tell, self.keep, launcher)


def costs_of(measurements: Mapping[str, Any]) -> dict[str, RunCost]:
    """What the steps of every arm cost, by its key."""
    return {key: cost_of(record) for key, record in measurements.items()}

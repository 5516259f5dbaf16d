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
from app.study.locking import held
from app.study.measuring import measure_arms, read_arms, record_path
from app.study.running import Run, make_runs, plan_runs, planned
from modules.errors import InputError
from modules.files import replace_file
from modules.functional.budget import RunCost

DESIGN, MEASURED, LOCK = "design.json", "measure", "study.lock"


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
                same names that are measured; seeds that are none; a budget that lacks a size.
        """
        seeds = list(self.seeds)
        if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
            raise InputError(f"seeds={seeds} must name at least one seed, each once and none below 0; [0, 1] is usual")
        for arm in self.arms:
            self.budget.seconds_of(arm.size)
        there = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        if DESIGN not in there and set(there) - {LOCK}:
            raise InputError(f"folder={self.folder} holds something else than a study; give a new folder")
        with held(self.folder / LOCK, lambda: None):
            return self._noted()

    def _noted(self) -> "Study":
        """This one, together with what the folder holds of it; that is its design from now on."""
        study = self._with(Study.read(self.folder)) if (self.folder / DESIGN).exists() else self
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
        others = [key for key in ours if key in theirs and ours[key] != theirs[key]]
        changed = [key for key in others if self._is_measured(ours[key])]
        changed += ["anchor"] if self.anchor != known.anchor else []
        changed += ["budget"] if replace(self.budget, modes=known.budget.modes) != known.budget else []
        if changed:
            raise InputError(
                f"folder={self.folder} holds a study in which {changed[0]} is another one; give a new folder, or the "
                "configuration of that study (arms, seeds and modes may be added)"
            )
        kept = {key: arm for key, arm in theirs.items() if key in ours or self._is_measured(arm)}
        return replace(
            self,
            arms=list((kept | ours).values()),
            seeds=list(dict.fromkeys([*known.seeds, *self.seeds])),
            budget=replace(self.budget, modes=list(dict.fromkeys([*known.budget.modes, *self.budget.modes]))),
        )

    def _is_measured(self, arm: Arm) -> bool:
        return record_path(self.folder / MEASURED, arm, 0).exists()

    def measured(self) -> "tuple[Study, dict[str, Any]]":
        """The part of the study whose step times are there, and these by arm.

        Raises:
            InputError: there are none yet.
        """
        records = read_arms(self.arms, self.folder / MEASURED)
        sizes = {arm.size for arm in self.arms if arm.name == self.anchor and arm.key in records}
        arms = [arm for arm in self.arms if arm.size in sizes and arm.key in records]
        if not arms:
            raise InputError(f"{self.folder} has no step times yet; begin with growmoe compare -c FILE")
        return replace(self, arms=arms), {arm.key: records[arm.key] for arm in arms}

    def runs(self, records: Mapping[str, Any], is_kept: bool = False) -> list[Run]:
        """All runs, finished or not, by the measurements of their arms.

        Args:
            is_kept: their lengths are decided from now on.
        """
        costs, folder = costs_of(records), self.folder / "runs"
        return plan_runs(self.arms, costs, self.anchor, self.budget, self.seeds, folder, is_kept)

    def work(self, tell: Callable[[str], None], launcher: str = "", only: str | None = None) -> list[str]:
        """Do everything that is not done yet; returns what failed.

        Args:
            only: a part of an arm's name, or seed-N: the runs to make.
        """
        names = [arm.key for arm in self.arms]
        if only is not None and not any(only in name for name in names) and only not in map(seed_name, self.seeds):
            raise InputError(f"only={only} is in the name of no run; choose a part of {', '.join(names)}, or seed-N")
        records = measure_arms(self.arms, self.folder / MEASURED, self.measuring, tell, launcher)
        runs, costs = self.runs(records, is_kept=True), costs_of(records)
        chosen = [run for run in runs if only is None or only in run.arm.key or only == seed_name(run.seed)]
        for line in planned(runs, costs):
            tell(line)
        return make_runs(chosen, costs, tell, self.keep, launcher)


def seed_name(seed: int) -> str:
    """As in names of runs."""
    return f"seed-{seed}"


def costs_of(measurements: Mapping[str, Any]) -> dict[str, RunCost]:
    """What the steps of every arm cost, by its key."""
    return {key: cost_of(record) for key, record in measurements.items()}

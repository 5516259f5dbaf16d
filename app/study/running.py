"""The runs of a study: each is made once, goes on where a crash has left it, and leaves a result behind."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from app.checkpoint_folder import list_checkpoints
from app.report import words
from app.study.budget import arm_steps
from app.study.children import ChildFailed, run_command
from app.study.design import Arm, Keep, StudyBudget, option, to_yaml
from app.study.locking import held
from app.study.results import result_of
from modules.config import MANIFEST
from modules.errors import InputError
from modules.files import replace_file
from modules.functional.budget import Mode, RunCost
from modules.functional.schedule import ScheduleConfig

RESULT = "result.json"
TRAINED = "trained"
"""a file that says so: the run has come to its end, with everything behind its last step"""
PLAN = "plan.json"
"""steps of every arm by mode"""


@dataclass(frozen=True)
class Run:
    """One training of an arm.

    Attributes:
        steps: that the budget buys.
        modes: of the budget, to which it answers: those that come to the same steps share a run.
    """

    arm: Arm
    seed: int
    steps: int
    modes: tuple[Mode, ...]
    folder: Path

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.arm.key}, seed {self.seed}"

    @property
    def result(self) -> dict[str, Any] | None:
        """What it came to; None while it is not finished. Raises `InputError` where it cannot be read."""
        path = self.folder / RESULT
        if not path.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} cannot be read ({error}); delete it to have it written again") from None
        return found


def plan_runs(
    arms: Sequence[Arm],
    costs: Mapping[str, RunCost],
    anchor: str,
    budget: StudyBudget,
    seeds: Sequence[int],
    folder: Path,
    is_kept: bool = False,
) -> list[Run]:
    """All runs: those of the first seed before those of the next one.

    Args:
        folder: for the runs.
        is_kept: note their lengths beside it. A length that was noted stays, whatever is measured later.
    """
    anchors = {arm.size: costs[arm.key] for arm in arms if arm.name == anchor}
    wanted: dict[tuple[str, int], list[Mode]] = {}
    lengths = _read_lengths(folder.parent / PLAN)
    for arm in arms:
        for mode in budget.modes:
            steps = lengths.setdefault(arm.key, {}).get(mode)
            if steps is None:
                steps = arm_steps(costs[arm.key], anchors[arm.size], arm.size, mode, budget)
                _check_length(arm, costs[arm.key], steps)
                lengths[arm.key][mode] = steps
            wanted.setdefault((arm.key, steps), []).append(mode)
    if is_kept:
        replace_file(folder.parent / PLAN, (json.dumps(lengths, indent=1) + "\n").encode())
    by_key = {arm.key: arm for arm in arms}
    return [
        Run(by_key[key], seed, steps, tuple(modes), folder / key / f"steps-{steps}-seed-{seed}")
        for seed in seeds
        for (key, steps), modes in wanted.items()
    ]


def planned(runs: Sequence[Run], costs: Mapping[str, RunCost]) -> Iterator[str]:
    """What the runs will be, in lines."""
    seconds = {(run.arm.key, run.steps): costs[run.arm.key].accelerator_seconds(run.steps) for run in runs}
    width = max(len(key) for key, _ in seconds)
    for (key, steps), taken in seconds.items():
        cost = costs[key]
        yield (
            f"{key:<{width}}  {steps:>8,} steps, in the end of {1000 * cost.step_seconds:,.4g} ms  "
            f"{words.short(steps * cost.tokens_per_step):>6} tokens  {words.duration(taken)} of accelerator time"
        )
    total = sum(seconds[run.arm.key, run.steps] for run in runs)
    finished = sum(run.result is not None for run in runs)
    yield f"{len(runs)} runs, {words.duration(total)} of accelerator time; {finished} are finished"


def _read_lengths(path: Path) -> dict[str, dict[Mode, int]]:
    if not path.exists():
        return {}
    found: dict[str, dict[Mode, int]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _check_length(arm: Arm, cost: RunCost, steps: int) -> None:
    """Raise `InputError` for a run in which the warm-up or the growth does not end."""
    schedule = ScheduleConfig(**(option(arm.options, "model.init_args.schedule") or {}))
    late = max(stage.begins(steps, cost.tokens_per_step) for stage in cost.stages)
    if schedule.warmup_steps >= steps or late >= steps:
        what = "its growth" if schedule.warmup_steps < steps else f"the warm-up of {schedule.warmup_steps} steps"
        raise InputError(
            f"the budget buys {arm.key} {steps} steps, in which {what} does not end; raise the budget or change the arm"
        )


def make_runs(
    runs: Sequence[Run], costs: Mapping[str, RunCost], tell: Callable[[str], None], keep: Keep, launcher: str = ""
) -> list[str]:
    """Make every run that is not finished; returns what failed, in words. A failed run does not keep others back.

    Several processes may share a study: a run that another one is at work on is left to it, and waited for at the end.
    """
    failures: list[str] = []
    left: list[Run] = []
    for queue, is_last in ((runs, False), (left, True)):
        for number, run in enumerate(queue, start=1):
            waiting = partial(tell, f"waiting for another process: {run.name}") if is_last else None
            with held(run.folder.with_suffix(".lock"), waiting) as is_ours:
                if not is_ours:
                    left.append(run)
                elif run.result is None:
                    tell(f"run {number} of {len(queue)}: {run.name}, {run.steps} steps")
                    try:
                        _make(run, costs[run.arm.key], keep, launcher)
                    except (ChildFailed, InputError) as error:
                        failures.append(f"{run.name}: {error}")
                        tell(failures[-1])
    return failures


def _make(run: Run, cost: RunCost, keep: Keep, launcher: str) -> None:
    config = run.folder.with_suffix(".yaml")
    replace_file(config, to_yaml(run.arm.configuration(run.seed, str(run.folder), run.steps)).encode())
    if not (run.folder / TRAINED).exists():
        _step_back(run)
        run_command(["fit", "--config", str(config), "--ckpt_path", "auto"], run.folder.with_suffix(".log"), launcher)
        replace_file(run.folder / TRAINED, b"")
    result = {
        "size": run.arm.size,
        "arm": run.arm.name,
        "seed": run.seed,
        "steps": run.steps,
        "tokens": run.steps * cost.tokens_per_step,
        "accelerator_seconds": cost.accelerator_seconds(run.steps),
        "flops": cost.flops(run.steps),
        **result_of(run.folder, run.steps, cost),
    }
    replace_file(run.folder / RESULT, (json.dumps(result) + "\n").encode())
    _prune(run.folder / "checkpoints", keep)


def _step_back(run: Run) -> None:
    """Drop the checkpoint of the last step of a run that was killed behind it.

    The validation and the evaluation of that step come behind its checkpoint, and only a run that trains up to it makes
    them.
    """
    for path in list_checkpoints(run.folder / "checkpoints")[-1:]:
        if path.name == f"step-{run.steps:08d}":
            _delete(path)


def _delete(path: Path) -> None:
    (path / MANIFEST).unlink()  # the commit mark first
    shutil.rmtree(path)


def _prune(folder: Path, keep: Keep) -> None:
    """Delete checkpoints of a run that has its result."""
    checkpoints = list_checkpoints(folder)
    for path in {"all": [], "last": checkpoints[:-1], "none": checkpoints}[keep]:
        _delete(path)

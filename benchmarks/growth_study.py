"""What growing is worth: tokens and seconds to the loss that the large model reaches from scratch.

    python -m benchmarks.growth_study --folder DIR --root CORPORA [--steps 600] [--grow-at 200] [--seeds 0 1 2]

from the root of the repository, on corpora from `growmoe prepare`. Every arm is a `growmoe fit` in a folder of its own:
the source and the target from scratch, the source continued, and growth of the source by each method and each treatment
of the optimizer's state; then the same for mixtures. Stopped, it goes on where it was: a finished arm is not run again,
an unfinished one resumes from its newest checkpoint. `--report` prints the tables of what is there.

Arms that grow start from the source's checkpoint at `--grow-at`, whose cost is counted. Seconds are step times of the
arm's own log, summed: compare them only if all arms ran on one machine that did nothing else.
"""

import argparse
import csv
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
SOURCE = {"dim": 96, "num_layers": 2, "num_heads": 2}
TARGET = {"dim": 192, "num_layers": 4, "num_heads": 4}
MOE = {"num_experts": 8, "top_k": 2}
METHODS = {"fpi": {"preset": "fpi"}, "iso": {"split_noise": 0.1}, "aki_pro": {"preset": "aki_pro"}}
STATES = ("mapped", "asymmetric", "reset")


@dataclass(frozen=True)
class Arm:
    """One run: the architecture that it begins with, and the stage that it goes through, if any."""

    name: str
    architecture: dict[str, Any]
    stage: dict[str, Any] | None = None
    source: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def all_arms() -> list[Arm]:
    """Dense arms first, then mixtures; an arm's source comes before it."""
    arms = [Arm("source", SOURCE), Arm("scratch", TARGET)]
    for method, options in METHODS.items():
        for state in STATES:
            stage = {"target": TARGET, **options, "optimizer_state": state}
            arms.append(Arm(f"{method}, {state}", SOURCE, stage, "source"))
    arms += [Arm("MoE from scratch", {**TARGET, "moe": MOE})]
    fine = {**MOE, "num_experts": 16, "top_k": 4, "expert_dim": 256}
    for name, moe, variation in (("copy", MOE, "copy"), ("drop", MOE, "drop"), ("virtual group", fine, "copy")):
        arms.append(Arm(f"upcycle, {name}", TARGET, {"target": {"moe": moe}, "upcycle": variation}, "scratch"))
    return arms


def folder_of(arm: str, seed: int, folder: Path) -> Path:
    """The run directory of an arm."""
    return folder / f"seed-{seed}" / arm.replace(", ", "-").replace(" ", "-")


def configuration(arm: Arm, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """What `growmoe fit` is given."""
    stages = [] if arm.stage is None else [{**arm.stage, "at_step": given.grow_at, "seed": seed}]
    return {
        "seed_everything": seed,
        "trainer": {
            "max_steps": given.steps,
            "val_check_interval": given.every,
            "log_every_n_steps": 10,
            "default_root_dir": str(folder_of(arm.name, seed, given.folder)),
        },
        "model": {
            "class_path": "modules.MoELM" if "moe" in arm.architecture else "modules.DenseLM",
            "init_args": {
                "architecture": arm.architecture,
                "optimizer": {"lr": 2e-3},
                "schedule": {"warmup_steps": max(1, given.steps // 20), "decay_fraction": 0.2},
            },
        },
        "data": {
            "class_path": "datamodules.BilingualText",
            "init_args": {
                "root": str(given.root),
                "weights": {"en": 0.5, "zh": 0.5},
                "seq_len": 256,
                "batch_size": 8,
                "val_samples": 64,
                "seed": seed,
            },
        },
        "growth": {"stages": stages},
        "checkpoint": {"every_n_steps": given.grow_at, "keep_last": 99},
        "evaluation": {"at_end": False, "at_transitions": False},
        "wandb": {"mode": "disabled"},
    }


def run(arm: Arm, seed: int, given: argparse.Namespace) -> None:
    """Run an arm to its end, from where it stands."""
    run_dir = folder_of(arm.name, seed, given.folder)
    checkpoints = run_dir / "checkpoints"
    if (checkpoints / f"step-{given.steps:08d}").is_dir():
        return
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(configuration(arm, seed, given)))
    start = "auto"
    if arm.source is not None and not checkpoints.is_dir():
        start = str(folder_of(arm.source, seed, given.folder) / "checkpoints" / f"step-{given.grow_at:08d}")
    print(f"seed {seed}: {arm.name}", flush=True)
    command = [sys.executable, "-m", "app", "fit", "--config", str(path), "--ckpt_path", start]
    with run_dir.with_suffix(".log").open("a") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{arm.name}, seed {seed} ended with {done.returncode}: see {run_dir.with_suffix('.log')}")


def curve(arm: Arm, seed: int, given: argparse.Namespace) -> list[tuple[int, float, float]]:
    """Tokens, seconds and validation loss of a finished arm, those of its source up to the growth included."""
    points = []
    if arm.source is not None:
        source = next(other for other in all_arms() if other.name == arm.source)
        points = [point for point in curve(source, seed, given) if point[0] <= given.grow_at * 8 * 256]
    begin = given.grow_at if arm.source is not None else 0
    seconds, step_ms, last = (points[-1][1] if points else 0.0), None, begin
    path = folder_of(arm.name, seed, given.folder) / "metrics.csv"
    for row in csv.DictReader(path.open(newline="")):
        step = int(row["step"])
        step_ms = float(row["perf/step_ms"]) if row.get("perf/step_ms") else step_ms
        if step > last and step_ms is not None:
            seconds, last = seconds + (step - last) * step_ms / 1e3, step
        if row.get("val/loss") and step > begin:
            points.append((step * 8 * 256, seconds, float(row["val/loss"])))
    return points


def reached(points: list[tuple[int, float, float]], loss: float) -> tuple[float, float] | None:
    """Tokens and seconds at which a curve is first at or below a loss, between two measurements linearly."""
    for before, after in pairwise(points):
        if after[2] <= loss:
            share = 1.0 if before[2] <= loss else (before[2] - loss) / (before[2] - after[2])
            return tuple(one + (other - one) * share for one, other in zip(before[:2], after[:2], strict=True))
    return None


def report(given: argparse.Namespace) -> None:
    """The table of all arms that every seed has finished, against the model of the same kind from scratch."""
    print("| arm | final loss | tokens to scratch's loss | seconds to scratch's loss |\n|---|---|---|---|")
    for arm in all_arms():
        finals, tokens, seconds = [], [], []
        for seed in given.seeds:
            moe = "moe" in arm.architecture or "moe" in (arm.stage or {"target": {}})["target"]
            rival = next(a for a in all_arms() if a.name == ("MoE from scratch" if moe else "scratch"))
            paths = [folder_of(a.name, seed, given.folder) / "checkpoints" for a in (arm, rival)]
            if not all((path / f"step-{given.steps:08d}").is_dir() for path in paths):
                break
            mine, theirs = curve(arm, seed, given), curve(rival, seed, given)
            finals.append(mine[-1][2])
            found = reached(mine, theirs[-1][2])
            if found is not None:
                tokens.append(found[0] / theirs[-1][0])
                seconds.append(found[1] / theirs[-1][1])
        if len(finals) == len(given.seeds):
            print(f"| {arm.name} | {_spread(finals, 3)} | {_spread(tokens, 2, len(finals))} | ", end="")
            print(f"{_spread(seconds, 2, len(finals))} |")


def _spread(values: list[float], digits: int, wanted: int | None = None) -> str:
    """Mean and standard deviation; how many of the seeds got there, when not all did."""
    if not values:
        return "not reached"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    some = f" ({len(values)} of {wanted} seeds)" if wanted is not None and len(values) < wanted else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}{some}"


def main() -> None:
    """Run what is missing, then report."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--folder", type=Path, required=True, help="where the runs lie")
    flags.add_argument("--root", type=Path, required=True, help="prepared corpora with en and zh")
    flags.add_argument("--steps", type=int, default=600, help="of every arm")
    flags.add_argument("--grow-at", type=int, default=200, help="the step of the transition")
    flags.add_argument("--every", type=int, default=20, help="steps between two validations")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--report", action="store_true", help="only print what is there")
    given = flags.parse_args()
    for seed in () if given.report else given.seeds:
        for arm in all_arms():
            run(arm, seed, given)
    report(given)


if __name__ == "__main__":
    main()

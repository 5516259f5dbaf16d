"""What growing is worth: tokens and seconds to the loss that the large model reaches from scratch.

    python -m benchmarks.growth_study --folder DIR --root CORPORA [--seeds 0 1 2] [--arms scratch sparkling ...]

from the root of the repository, on corpora from `growmoe prepare`. Every arm (benchmarks/growth_arms.py) is a
`growmoe fit` in a folder of its own: the small and the large model from scratch, the large one grown from the small one
by each method with each treatment of the optimizer's state, mixtures from scratch and upcycled, and the large dense
model trained on. Stopped, it goes on where it was: a finished arm is not run again, an unfinished one resumes from its
newest checkpoint. Several processes may work on different seeds.

`--measure` times a step of every architecture, interleaved; seconds in the report are steps times these, so that other
work on the machine while the arms run does not count. `--report` prints the tables of what is there, and `--picture
FILE` draws the curves. `--record FILE` keeps the validations of finished arms in a file, and an arm in it counts as
finished when its folder is gone: a study may go on for days and on several machines. benchmarks/growth_study.json is
the record behind docs/growth.md: `--report --folder runs/none --record benchmarks/growth_study.json` prints its tables.
"""

import argparse
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import growth_tables, timing
from benchmarks.growth_arms import Arm, Plan, all_arms, configuration
from modules.config import ModelConfig

ROOT = Path(__file__).resolve().parents[1]


def run(arm: Arm, seed: int, plan: Plan, given: argparse.Namespace) -> None:
    """Run an arm to its end, from where it stands; before it the arm that it leaves, if its checkpoint is missing."""
    if arm.checkpoint(arm.num_steps(plan), seed, given.folder).is_dir():
        return
    source = None if arm.source is None else all_arms()[arm.source]
    if source is not None and not source.checkpoint(plan.grow_at, seed, given.folder).is_dir():
        run(source, seed, plan, given)
    run_dir = arm.folder(seed, given.folder)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(configuration(arm, seed, plan, given.folder, given.root)))
    start = "auto"
    if source is not None and not (run_dir / "checkpoints").is_dir():
        start = str(source.checkpoint(plan.grow_at, seed, given.folder))
    print(f"seed {seed}: {arm.name}", flush=True)
    command = [sys.executable, "-m", "app", "fit", "--config", str(path), "--ckpt_path", start]
    with run_dir.with_suffix(".log").open("a") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{arm.name}, seed {seed} ended with {done.returncode}: see {run_dir.with_suffix('.log')}")


def measure(plan: Plan, vocab_size: int, rounds: int) -> dict[str, float]:
    """Seconds of a training step of each architecture, in float32 as the arms train, on one thread."""
    from benchmarks.model_contestants import our_model
    from modules.layers.transformer import Transformer

    shapes = {growth_tables.key(shape): shape for arm in all_arms().values() for shape in (arm.start, arm.end)}
    parser = argparse.ArgumentParser()
    timing.add_common_flags(parser, rounds, repeats=3)
    flags = parser.parse_args([])
    timing.set_up(flags)
    tokens = torch.randint(vocab_size, (plan.batch_size, plan.seq_len + 1))
    runs = {}
    for name, shape in shapes.items():
        config = ModelConfig.from_dict({"vocab_size": vocab_size, **shape})
        runs[name] = partial(our_model(Transformer(config), False).step, tokens, "fp32")
    turns = timing.interleave(runs, flags, partial(tokens.random_, vocab_size))
    for name, seconds in turns.seconds.items():
        print(f"{name}: {timing.spread(seconds, 4)} s a step")
    return {name: statistics.median(seconds) for name, seconds in turns.seconds.items()}


def parse() -> argparse.Namespace:
    """The command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--folder", type=Path, required=True, help="where the runs lie")
    flags.add_argument("--root", type=Path, help="prepared corpora with en and zh; not needed for --report")
    flags.add_argument("--record", type=Path, help="file that keeps what finished arms came to")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--arms", nargs="+", help="parts of names; all arms when left out")
    for name, default in vars(Plan()).items():
        flags.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="see growth_arms.Plan")
    flags.add_argument("--measure", action="store_true", help="only time the steps")
    flags.add_argument("--rounds", type=int, default=9, help="of --measure")
    flags.add_argument("--report", action="store_true", help="only print what is there")
    flags.add_argument("--picture", type=Path, help="draw the curves into this file")
    return flags.parse_args()


def main() -> None:
    """Run what is missing, measure, keep, report."""
    given = parse()
    plan = Plan(**{name: getattr(given, name) for name in vars(Plan())})
    wanted = [arm for arm in all_arms().values() if not given.arms or any(word in arm.name for word in given.arms)]
    study = growth_tables.Study(plan, given.folder, given.seeds, growth_tables.read_record(given.record, plan))
    if not (given.report or given.measure):
        for seed in given.seeds:
            for arm in wanted:
                if not study.is_finished(arm, seed):
                    run(arm, seed, plan, given)
    if given.measure or not study.record.step_seconds:
        manifest: dict[str, Any] = json.loads((given.root / "manifest.json").read_text())
        study.record.step_seconds |= measure(plan, manifest["vocab_size"], given.rounds)
    if given.record is not None:
        growth_tables.write_record(given.record, study)
    growth_tables.report(study, wanted)
    if given.picture is not None:
        growth_tables.draw(study, given.picture)


if __name__ == "__main__":
    main()

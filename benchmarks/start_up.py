"""How long a person waits: `growmoe --help`, and the first training step of `nano` from the shell.

    python benchmarks/start_up.py [--runs 5]

Prints the median and the range of each, in seconds of wall clock. The embedded world is made once, before the timing.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def time_help() -> float:
    """Seconds until `growmoe --help` has ended."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "app", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def time_first_step(world: str, run_dir: str) -> float:
    """Seconds until the line of the first optimizer step is on the screen."""
    command = [sys.executable, "-m", "app", "fit", "--config", "configs/model/nano.yaml"]
    command += [
        "--config",
        "configs/data/synthetic_world.yaml",
        "--data.root",
        world,
        "--trainer.default_root_dir",
        run_dir,
    ]
    command += ["--trainer.max_steps", "60", "--trainer.log_every_n_steps", "1"]
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("step      1 "):
                break
        else:
            raise SystemExit(f"no first step: {' '.join(command)}")
        seconds = time.perf_counter() - start
        run.kill()
    return seconds


def main() -> None:
    """Time both and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        world = str(Path(folder) / "world")
        time_first_step(world, str(Path(folder) / "warm-up"))
        helps = [time_help() for _ in range(runs)]
        steps = [time_first_step(world, str(Path(folder) / f"run-{number}")) for number in range(runs)]
    for name, times in (("growmoe --help", helps), ("first step of nano", steps)):
        median = statistics.median(times)
        sys.stdout.write(f"{name:<20} median {median:6.2f} s   range {min(times):.2f} to {max(times):.2f} s\n")


if __name__ == "__main__":
    main()

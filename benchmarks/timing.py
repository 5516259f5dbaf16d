"""What the benchmarks share: flags, set-up of the process, interleaved timing, peak memory and tables.

A machine that others use too makes absolute times drift by tens of percent within a minute. Contestants therefore take
turns inside one process, and every ratio is formed within a round; what is reported is the median over rounds.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import os
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from app.allocator import keep_pages

PROBE_BYTES = 64 * 2**20
"""glibc gives blocks of more than 32 MiB back to the kernel at every free, whatever it has learnt."""


def add_common_flags(parser: argparse.ArgumentParser, rounds: int, repeats: int, warm_up: int = 5) -> None:
    """Flags of every benchmark."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=at_least(1), default=1, help="threads of torch on the CPU")
    parser.add_argument("--rounds", type=at_least(1), default=rounds, help="rounds of turns that count")
    parser.add_argument("--warm_up", type=at_least(0), default=warm_up, help="rounds before them, which do not count")
    parser.add_argument("--repeats", type=at_least(1), default=repeats, help="timed runs in a turn; the fastest counts")
    parser.add_argument("--fp32_precision", choices=("highest", "high", "medium"), default="highest")
    parser.add_argument("--keep_pages", action=argparse.BooleanOptionalAction, default=True, help="glibc keeps memory")
    parser.add_argument(
        "--fresh_batches",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="every run has another batch, as in training: loads of experts differ, and code is made for them",
    )
    parser.add_argument("--seed", type=int, default=0)


def at_least(least: int) -> Callable[[str], int]:
    """A whole number of a flag that must not be smaller."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return whole_number


def set_up(flags: argparse.Namespace) -> None:
    """Threads, precision of fp32 products, allocator and seed, alike for all contestants; prints what they run on."""
    if flags.keep_pages and flags.device == "cpu":
        keep_pages()
    torch.set_num_threads(flags.threads)
    torch.set_float32_matmul_precision(flags.fp32_precision)
    torch.manual_seed(flags.seed)
    print(describe_machine(flags.device))
    print(f"fp32 products: {flags.fp32_precision}; {describe_allocator()}")
    clock = "processor time of the one thread" if counts_processor_time(flags.device) else "wall-clock time"
    turns = f"{flags.rounds} interleaved rounds behind {flags.warm_up} that do not count"
    turns += f", the fastest of {flags.repeats} in each turn"
    batches = "another batch for every run" if flags.fresh_batches else "one batch for all runs"
    print(f"{turns}, {batches}; {clock}; median (least–most)\n")


# -- the process -------------------------------------------------------------------------------------------------------


def describe_allocator() -> str:
    """Whether memory is kept once the same allocation has come round a few times: page faults tell."""
    for _ in range(8):
        before = page_faults()
        torch.zeros(PROBE_BYTES, dtype=torch.uint8)
        faults = page_faults() - before
    pages = PROBE_BYTES // resource.getpagesize()
    kept = "keeps its pages" if faults < pages // 10 else "gives pages back"
    return f"host allocator {kept}: {faults} page faults for 64 MiB freed and taken again, of {pages} possible"


def page_faults() -> int:
    """Pages that the kernel has handed to this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@cache
def installed(package: str) -> bool:
    """Whether a peer can be imported; says so once where it cannot."""
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(f"{package} is not installed: left out")
    return found


def describe_machine(device: str) -> str:
    """Processor or accelerator, threads, and the versions that matter."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    packages = ["torch", *(peer for peer in ("transformers", "litgpt", "torchtitan") if importlib.util.find_spec(peer))]
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    return f"{name}, {torch.get_num_threads()} thread(s); Python {platform.python_version()}, {versions}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    extensions = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in flags]
    return f"{names[0] if names else platform.processor()} ({', '.join(extensions) or platform.machine()})"


def has_room(num_bytes: float, device: str) -> bool:
    """Whether so many bytes can be taken; a quarter of the memory is left for everything that was not counted."""
    if device == "cuda":
        available = torch.cuda.mem_get_info()[0]
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return num_bytes < 0.75 * available


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


# -- time --------------------------------------------------------------------------------------------------------------


def now(device: str) -> float:
    """Seconds, after waiting for the device: the processor's time where one thread works, which others on the same core
    do not lengthen as long as they leave the caches alone; wall-clock time elsewhere."""
    synchronize(device)
    return time.process_time() if counts_processor_time(device) else time.perf_counter()


def counts_processor_time(device: str) -> bool:
    """Whether `now` leaves out the time of other processes."""
    return device == "cpu" and torch.get_num_threads() == 1


def time_once(run: Callable[[], object], device: str) -> float:
    """Seconds of one run."""
    start = now(device)
    run()
    return now(device) - start


@dataclass(frozen=True)
class Turns:
    """Of each contestant in each round: seconds of the fastest run, and page faults of the mean one."""

    seconds: dict[str, list[float]]
    faults: dict[str, list[float]]


def interleave(
    runs: Mapping[str, Callable[[], object]],
    flags: argparse.Namespace,
    renew: Callable[[], object],
    settle: bool = True,
) -> "Turns":
    """Let every contestant work once in each round, in an order that is drawn anew for every round.

    The first rounds do not count: while the heap grows, and code is made for sizes that have not been met, which is
    over within the first minute of a training, a MoE step has tens of thousands of page faults (docs/log.md).

    Args:
        runs: one piece of work for each name.
        flags: rounds, warm_up (those before them), repeats of a turn, device, fresh_batches.
        renew: draws another batch; called before every run, and not timed.
        settle: begin each turn with a run that is not timed, for caches and clocks.
    """
    turns = Turns({name: [] for name in runs}, {name: [] for name in runs})
    order, draw = list(runs), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for number in range(-flags.warm_up, flags.rounds):
            draw.shuffle(order)
            for name in order:
                seconds, faults = _take_turn(runs[name], flags, renew if flags.fresh_batches else None, settle)
                if number >= 0:
                    turns.seconds[name].append(seconds)
                    turns.faults[name].append(faults)
            gc.collect()
            if sys.stderr.isatty():
                print(f"\rround {number + 1} of {flags.rounds} ", end="\r", file=sys.stderr, flush=True)
    finally:
        gc.enable()
    return turns


def _take_turn(
    run: Callable[[], object], flags: argparse.Namespace, renew: Callable[[], object] | None, settle: bool
) -> tuple[float, float]:
    """Seconds of the fastest run, and page faults of the mean one."""
    seconds, faults = [], 0
    for number in range(flags.repeats + settle):
        if renew:
            renew()
        before = page_faults()
        time_taken = time_once(run, flags.device)
        if number >= settle:
            seconds.append(time_taken)
            faults += page_faults() - before
    return min(seconds), faults / flags.repeats


def ratios(seconds: Sequence[float], base: Sequence[float]) -> list[float]:
    """Time over that of the base in the same round."""
    return [mine / its for mine, its in zip(seconds, base, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`median (least–most)`."""
    median, least, most = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({least:.{digits}f}–{most:.{digits}f})"


def product_run(dtype: torch.dtype, device: str, size: int | None = None) -> tuple[Callable[[], object], int]:
    """A large matrix product, the machine's peak in practice, and its FLOPs."""
    size = size or (8192 if device == "cuda" else 2048)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    result = torch.empty(size, size, device=device, dtype=dtype)
    return lambda: torch.mm(left, right, out=result), 2 * size**3


# -- memory ------------------------------------------------------------------------------------------------------------


def peak_growth(run: Callable[[], object], device: str) -> int:
    """Bytes that tensors take at the worst moment of a run, above what they take before it.

    On the CPU every allocation and release of torch's allocator is added up (profiler events), on CUDA the caching
    allocator knows it; both are exact, and blind to what libraries take for themselves.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = worst = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        worst = max(worst, held)
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's library writes lines of its own to the error stream."""
    sys.stderr.flush()
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


def mebibytes(num_bytes: float) -> str:
    """Without decimals."""
    return f"{num_bytes / 2**20:,.0f}"


# -- tables ------------------------------------------------------------------------------------------------------------


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A markdown table whose columns line up in a terminal, too."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    print(f"**{title}**\n")
    for number, row in enumerate((header, *rows)):
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        print(f"| {' | '.join(cells)} |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(flush=True)

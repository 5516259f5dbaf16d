"""The devices of this process: what they are, and how fast they multiply matrices."""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from app.doctor.findings import Problem, Section

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
"""Flags of /proc/cpuinfo that matter for matrix products."""
LEAST_SHARED_MEMORY = 2**30
ENOUGH_SECONDS = 0.02
LARGEST = 8192


@dataclass(frozen=True)
class Rates:
    """FLOP/s of square matrix products."""

    fp32: float
    bf16: float


def device_of(local_rank: int) -> torch.device:
    """The device that the process with this number on its host would train on."""
    count = torch.cuda.device_count()
    return torch.device("cuda", local_rank % count) if count else torch.device("cpu")


def check_devices(device: torch.device, rates: Rates) -> Section:
    """Name, memory, instructions or capability, and measured rates, of this process's device and host."""
    section = Section("Devices", ("device", "is", "memory", "fp32", "bf16"))
    shown = (f"{rates.fp32 / 1e9:,.0f} GFLOP/s", f"{rates.bf16 / 1e9:,.3g} GFLOP/s")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        kind = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        section.rows.append((str(device), kind, f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free", *shown))
        section.rows.append(("cpu", describe_processors(), _host_memory(), "", ""))
    else:
        section.rows.append(("cpu", describe_processors(), _host_memory(), *shown))
        if Path("/dev/nvidiactl").exists():
            fix = "install torch for CUDA (its version ends in +cu…), and look at what nvidia-smi says"
            section.problems.append(Problem("there is an NVIDIA GPU that torch does not see", fix))
    if rates.bf16 < 0.9 * rates.fp32:
        what = f"bf16 products take {rates.fp32 / rates.bf16:.1f} times as long as those of fp32 on {device}"
        section.problems.append(Problem(what, "leave trainer.precision at 32-true on this machine", False))
    section.problems += check_shared_memory(Path("/dev/shm"))
    return section


def measure_rates(device: torch.device) -> Rates:
    """The best of a few products of each type, of a size that takes long enough to be timed."""
    return Rates(_rate(device, torch.float32), _rate(device, torch.bfloat16))


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    size, seconds = 128, 0.0
    while seconds < ENOUGH_SECONDS and size < LARGEST:
        size *= 2
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        seconds = min(_seconds(matrix) for _ in range(3))
    return 2 * size**3 / seconds


def _seconds(matrix: torch.Tensor) -> float:
    """Of one product; the result is read, so that it is finished also on a GPU."""
    started = time.perf_counter()
    (matrix @ matrix)[0, 0].item()
    return time.perf_counter() - started


def describe_processors(cpuinfo: str | None = None) -> str:
    """Model, instruction sets, cores that this process may use, and its threads."""
    cpuinfo = _read(Path("/proc/cpuinfo")) if cpuinfo is None else cpuinfo
    model = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", cpuinfo, re.MULTILINE)
    known = [name for name in INSTRUCTIONS if flags and name in flags[1].split()]
    instructions = " ".join(known) or torch.backends.cpu.get_cpu_capability()
    name = model[1] if model else "processors"
    return f"{name}, {instructions}, {usable_cores()} cores, {torch.get_num_threads()} threads"


def usable_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_shared_memory(folder: Path) -> list[Problem]:
    """Data loaders hand samples over in /dev/shm, which containers make small."""
    if not folder.is_dir():
        return []
    size = os.statvfs(folder).f_blocks * os.statvfs(folder).f_frsize
    if size >= LEAST_SHARED_MEMORY:
        return []
    fix = "start the container with --shm-size 8g, or mount an emptyDir with medium: Memory there"
    return [Problem(f"{folder} has {size / 2**20:.0f} MiB", fix, False)]


def _host_memory() -> str:
    lines = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read(Path("/proc/meminfo")), re.MULTILINE))
    if not {"MemAvailable", "MemTotal"} <= set(lines):
        return "unknown"
    return f"{int(lines['MemAvailable']) / 2**20:.0f} of {int(lines['MemTotal']) / 2**20:.0f} GiB free"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

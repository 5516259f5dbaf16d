"""Whether all processes are alike: on which hosts they are, with which devices, libraries and configuration."""

import hashlib
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from app.doctor.devices import Rates, usable_cores
from app.doctor.findings import Problem, Section
from app.doctor.place import Place
from app.doctor.versions import installed_versions

SLOW = 0.7
"""A rank with less than this share of the median speed holds the others up."""


@dataclass(frozen=True)
class Facts:
    """What one process tells the others of itself."""

    rank: int
    local_rank: int
    host: str
    device: str
    versions: dict[str, str]
    threads: int
    cores: int
    config: str = ""
    rates: Rates | None = None

    @property
    def is_gpu(self) -> bool:
        """Whether it trains on a GPU."""
        return not self.device.startswith("cpu")


def own_facts(place: Place, device: torch.device, config: Path | None, rates: Rates | None = None) -> Facts:
    """Of this process."""
    name = "cpu"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{device} {properties.name} {getattr(properties, 'uuid', '')}".strip()
    digest = hashlib.sha256(config.read_bytes()).hexdigest() if config else ""
    return Facts(
        rank=place.rank,
        local_rank=place.local_rank,
        host=socket.gethostname(),
        device=name,
        versions={**installed_versions(), "CUDA of torch": torch.version.cuda or "none"},
        threads=torch.get_num_threads(),
        cores=usable_cores(),
        config=digest,
        rates=rates,
    )


def gather(facts: Facts) -> list[Facts]:
    """Those of all processes, by rank."""
    if not dist.is_initialized():
        return [facts]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, facts)
    return everyone


def check_ranks(everyone: Sequence[Facts], place: Place) -> Section:
    """One row for each host, and where ranks differ that must not."""
    section = Section(
        "Ranks", ("host", "ranks", "local ranks", "devices", "cores", "threads each", "slowest fp32, bf16")
    )
    for host in dict.fromkeys(facts.host for facts in everyone):
        here = [facts for facts in everyone if facts.host == host]
        kinds = Counter(" ".join(facts.device.split()[1:-1]) or facts.device for facts in here)
        section.rows.append(
            (
                host,
                _intervals(facts.rank for facts in here),
                _intervals(facts.local_rank for facts in here),
                ", ".join(f"{number} x {kind}" for kind, number in kinds.items()),
                str(here[0].cores),
                " to ".join(str(n) for n in sorted({min(f.threads for f in here), max(f.threads for f in here)})),
                _slowest(here),
            )
        )
        section.problems += _problems_of_host(host, here)
    where = "" if place.world_size == 1 else f", started by {place.launcher}, which meet at {place.meeting_point}"
    section.title = f"Ranks: {len(everyone)}{where}"
    section.problems += _disagreements(everyone) + _slow_ranks(everyone)
    return section


def _problems_of_host(host: str, here: list[Facts]) -> list[Problem]:
    problems = []
    for device, count in Counter(facts.device for facts in here if facts.is_gpu).items():
        if count > 1:
            fix = (
                "start as many processes on a host as it has GPUs (--nproc_per_node), and look at CUDA_VISIBLE_DEVICES"
            )
            problems.append(Problem(f"{count} ranks on {host} share {device}", fix))
    if len({facts.local_rank for facts in here}) < len(here):
        fix = "give LOCAL_RANK 0, 1, … to the processes of each host, as torchrun does"
        problems.append(Problem(f"ranks on {host} have the same LOCAL_RANK", fix))
    threads, cores = sum(facts.threads for facts in here), here[0].cores
    if len(here) > 1 and threads > cores:
        fix = f"set OMP_NUM_THREADS={max(1, cores // len(here))}"
        problems.append(Problem(f"{len(here)} ranks on {host} use {threads} threads on {cores} cores", fix, False))
    return problems


def _disagreements(everyone: Sequence[Facts]) -> list[Problem]:
    """Who has another version or configuration than most."""
    problems = []
    for name in sorted({name for facts in everyone for name in facts.versions}):
        values = {facts.rank: facts.versions.get(name, "missing") for facts in everyone}
        fix = f"install the same {name} on every host, best from one image or one shared environment"
        problems += _differing(f"{name} is", values, fix)
    configs = {facts.rank: facts.config[:12] for facts in everyone}
    return problems + _differing("the digest of --config is", configs, "give every rank the same configuration file")


def _differing(what: str, values: dict[int, str], fix: str) -> list[Problem]:
    usual = Counter(values.values()).most_common(1)[0][0]
    others = sorted({value for value in values.values() if value != usual})
    return [
        Problem(f"{what} {value} on ranks {_intervals(r for r, v in values.items() if v == value)}, else {usual}", fix)
        for value in others
    ]


def _slow_ranks(everyone: Sequence[Facts]) -> list[Problem]:
    speeds = {facts.rank: facts.rates.fp32 for facts in everyone if facts.rates}
    if not speeds:
        return []
    median = sorted(speeds.values())[len(speeds) // 2]
    slow = [rank for rank, speed in speeds.items() if speed < SLOW * median]
    if not slow:
        return []
    what = f"ranks {_intervals(slow)} multiply matrices at less than {SLOW:.0%} of the median speed"
    return [Problem(what, "look for other work, heat or power limits on their hosts; every step waits for them", False)]


def _slowest(here: list[Facts]) -> str:
    rates = [facts.rates for facts in here if facts.rates]
    if not rates:
        return ""
    return f"{min(r.fp32 for r in rates) / 1e9:,.3g}, {min(r.bf16 for r in rates) / 1e9:,.3g} GFLOP/s"


def _intervals(numbers: Iterable[int]) -> str:
    """Numbers as in `0-3, 8`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)

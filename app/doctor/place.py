"""Where this process stands among those that were started with it, by what the launcher left in the environment."""

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from modules.errors import InputError


@dataclass(frozen=True)
class Place:
    """Number and address of a process.

    Attributes:
        rank, world_size: number among all processes.
        local_rank: number on its host.
        address, port: where rank 0 waits for the others.
        launcher: who started it: alone, torchrun or Slurm.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0
    launcher: str = "alone"

    @property
    def meeting_point(self) -> str:
        """As host and port."""
        return f"{self.address}:{self.port}"


def place_of(environment: Mapping[str, str]) -> Place:
    """Read torchrun's variables, or else srun's. Raises InputError for variables that contradict each other."""
    if "WORLD_SIZE" in environment or "RANK" in environment:
        return _from_torchrun(environment)
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment and _is_srun(environment):
        return _from_slurm(environment)
    return Place()


def _is_srun(environment: Mapping[str, str]) -> bool:
    """As Lightning decides: a shell that srun opened for a person is no task."""
    return environment.get("SLURM_JOB_NAME") not in ("bash", "interactive") and "SLURM_NTASKS" in environment


def _from_torchrun(environment: Mapping[str, str]) -> Place:
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in environment]
    if missing:
        there = " and ".join(f"{name}={environment[name]}" for name in ("RANK", "WORLD_SIZE") if name in environment)
        raise InputError(
            f"the environment has {there} without {', '.join(missing)}, so the processes cannot meet; start them with "
            "torchrun, which sets all of these, or unset WORLD_SIZE and RANK to look at this process alone"
        )
    rank, world_size, local_rank, port = (
        _number(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    )
    if not rank < world_size:
        raise InputError(
            f"RANK={rank} is not below WORLD_SIZE={world_size}; give ranks 0 to {world_size - 1}, each once"
        )
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "the environment"
    return Place(rank, world_size, local_rank, environment["MASTER_ADDR"], port, launcher)


def _from_slurm(environment: Mapping[str, str]) -> Place:
    """Address and port as Lightning chooses them, which `fit` uses."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    nodes = environment.get("SLURM_NODELIST", "127.0.0.1")
    address = environment.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(nodes)
    port = environment.get("MASTER_PORT") or str(15000 + int(environment.get("SLURM_JOB_ID", "0")[-4:]))
    rank, world_size, local_rank = (
        _number(environment, name) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    )
    return Place(rank, world_size, local_rank, address, int(port), "Slurm")


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdecimal():
        raise InputError(
            f"{name}={value!r} is not a whole number of at least 0; let the launcher set it, or correct it"
        )
    return int(value)


def meet(place: Place, device: torch.device, timeout: float) -> None:
    """Form a group with the other processes. Raises InputError when some do not come in time."""
    os.environ |= {"MASTER_ADDR": place.address, "MASTER_PORT": str(place.port)}
    started = time.monotonic()
    is_gpu = device.type == "cuda"
    try:
        if place.rank > 0:
            _reach(place, timeout)
        if is_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if is_gpu else "gloo",
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=max(1.0, timeout - time.monotonic() + started)),
        )
        dist.barrier()
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).split("\n")[0].split("Exception raised")[0].strip()
        raise InputError(
            f"rank {place.rank} on {socket.gethostname()} did not meet the others of WORLD_SIZE="
            f"{place.world_size} at {place.meeting_point} within {timeout:g} s ({reason}); check that all are started, "
            "that this address can be reached from every host, and that no firewall is between"
        ) from None


def _reach(place: Place, timeout: float) -> None:
    """Wait until somebody listens at the meeting point: torch would report at length that nobody does."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((place.address, place.port), timeout=max(1.0, deadline - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)

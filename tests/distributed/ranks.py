"""Several processes of one test: gloo on this machine, one thread each."""

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

Work = Callable[..., Any]


def _begin(rank: int, world_size: int, port: int, log: Path, work: Work, arguments: tuple[Any, ...]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    work(*arguments)


def start(world_size: int, folder: Path, work: Work, *arguments: Any) -> tuple[list[int], list[str]]:
    """Run `work(*arguments)` in so many processes, which find each other as under torchrun.

    Returns:
        Exit codes, and what each process printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"rank-{rank}.txt" for rank in range(world_size)]
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "lightning.pytorch", "app.training"])
    processes = [
        context.Process(target=_begin, args=(rank, world_size, port, log, work, arguments), daemon=True)
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    for process in processes:
        if process.exitcode is None:
            process.kill()
    return [process.exitcode or 0 if process.exitcode is not None else -1 for process in processes], [
        log.read_text(errors="replace") for log in logs
    ]


def together(world_size: int, folder: Path, work: Work, *arguments: Any) -> None:
    """As `start`, and every process must end well."""
    codes, printed = start(world_size, folder, work, *arguments)
    assert codes == [0] * world_size, "\n".join(text[-3000:] for text in printed)


def command(arguments: list[str]) -> None:
    """A verb of growmoe, in each process."""
    from app.cli import main

    main(arguments)

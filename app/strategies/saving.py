"""Checkpoints that every process writes its part of, while training goes on."""

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from app import checkpoint as store
from app.checkpoint_parts import MOMENTS, Index, index_of, merged
from modules.files import directory_beside

Publish = Callable[[Path, Mapping[str, dict[str, Any]], Index], None]
"""Completes a directory that holds all parts: its path, the parts' fingerprints by name, the index of their tensors."""

FILE_BYTES = 2**30


@dataclass(frozen=True)
class Part:
    """What one process has written."""

    files: dict[str, dict[str, Any]]
    index: Index


class PartSaver:
    """Writes checkpoints in parts by torch's distributed checkpointing (DCP), one at a time and in the background.

    Values are copied to the CPU at once (not by `dcp.async_save`, whose stagers copy storages: some DTensors lack them
    in torch 2.13). A thread on every process writes them, in files of its own; when all are done, the first process
    adds what is left and renames the directory. Processes agree on the outcome by a group of their own, so that
    training may communicate meanwhile.

    Args:
        rank: the number of this process.
        timeout: how long processes wait for each other.
        device: what this process trains on.
    """

    def __init__(self, rank: int, timeout: timedelta, device: torch.device = torch.device("cpu")) -> None:
        self._rank = rank
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
        enter = partial(torch.cuda.set_device, device) if device.type == "cuda" else None  # else it is the first one
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=enter)
        self._pending: Future[None] | None = None

    def start(self, path: Path, tensors: dict[str, Tensor], publish: Publish) -> None:
        """Begin to write a checkpoint, once the one before is complete; all ranks together.

        Args:
            path: its directory.
            tensors: by name; DTensors, or the same on every process.
            publish: what the first process does when all parts are there.

        Raises:
            OSError: the one before could not be written, or this one cannot be begun, because it is there already or
                processes do not see the same storage; on every process.
        """
        self.finish()
        aside = self._agree(path, lambda: self._begin(path) if self._rank == 0 else None)[0]
        try:
            self._agree(path, lambda: _require_seen(aside))
        except OSError:
            self._clear(aside)
            raise
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self._pending = self._executor.submit(self._complete, path, aside, copies, publish)

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint was begun that is not complete."""
        pending = self._pending
        return pending is not None and not (pending.done() and pending.exception() is None)

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
            OSError: it could not be written; on every process.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait until nothing is being written, whatever became of it."""
        self._executor.shutdown()

    @staticmethod
    def _begin(path: Path) -> Path:
        if path.exists():
            raise FileExistsError("it exists already, and checkpoints are never overwritten")
        return directory_beside(path)

    def _complete(self, path: Path, aside: Path, tensors: dict[str, Tensor], publish: Publish) -> None:
        """In the background: write this process's part, and publish the whole when all are there."""

        def own_part() -> Part:
            writer = HuggingFaceStorageWriter(str(aside), _numbers_of_files(tensors), save_distributed=True)
            writer.per_thread_copy_ahead = 0  # values are on the CPU: DCP would wait for the GPU that trains
            dcp.save(tensors, storage_writer=writer, process_group=self._group)
            files = sorted(aside.glob(f"shard-{self._rank + 1:05d}-*.safetensors"))
            return Part({file.name: store.fingerprint(file) for file in files}, index_of(files))

        def publish_all() -> None:
            if self._rank == 0:
                files = {name: print_ for part in parts for name, print_ in part.files.items()}
                publish(aside, files, merged([part.index for part in parts]))

        try:
            parts = self._agree(path, own_part)
            self._agree(path, publish_all)
        except BaseException:
            self._clear(aside)
            raise

    def _clear(self, aside: Path) -> None:
        if self._rank == 0:
            shutil.rmtree(aside, ignore_errors=True)

    def _agree(self, path: Path, work: Callable[[], Any]) -> list[Any]:
        """Do something on every process; what it gave: to the first process on all of them, to others on the first.

        Raises:
            OSError: it failed somewhere.
        """
        result, reason = None, None
        try:
            result = work()
        except BaseException as error:  # DCP's exceptions are of that kind
            causes = [cause for cause, _ in getattr(error, "failures", {}).values()]
            reason = " / ".join(dict.fromkeys(f"{type(cause).__name__}: {cause}" for cause in causes or [error]))
        is_first = self._rank == 0
        try:
            outcomes: list[Any] = [None] * dist.get_world_size(self._group) if is_first else [(result, reason)]
            dist.gather_object((result, reason), outcomes if is_first else None, group=self._group)
            failures = [f"process {rank}: {reason}" for rank, (_, reason) in enumerate(outcomes) if reason]
            told = [(result, failures)]
            dist.broadcast_object_list(told, group=self._group)
        except RuntimeError as error:
            raise OSError(f"checkpoint {path} could not be written; a process does not answer: {error}") from None
        first, failures = told[0]
        if failures:
            raise OSError(f"checkpoint {path} could not be written; {failures[0]}")
        return [given for given, _ in outcomes] if is_first else [first]


def _require_seen(aside: Path) -> None:
    if not aside.is_dir():
        raise FileNotFoundError(f"{aside} is not seen from here: {store.SHARED}")


def _numbers_of_files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The file of each tensor, from 1: weights, then moments, of this process about `FILE_BYTES` in each.

    DCP puts a file together in memory before it writes it. The first process's numbers hold for all; it has the most.
    """
    numbers, number, size, kind = {}, 0, 0, None
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if kind != name.startswith(MOMENTS) or size + local.nbytes > FILE_BYTES:
            number, size, kind = number + 1, 0, name.startswith(MOMENTS)
        numbers[name], size = number, size + local.nbytes
    return numbers


def split_checkpoint(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Lightning's checkpoint dictionary: weights and what optimizers share out over processes, by name; the rest."""
    weights, rest = store.split_state(checkpoint)
    tensors = dict(weights.items())
    rest["optimizer_states"] = [_without_moments(state, tensors) for state in rest["optimizer_states"]]
    return tensors, rest


def _without_moments(optimizer_state: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A state dictionary less the DTensors in it, which go to `tensors`."""
    kept = {}
    for group in optimizer_state["param_groups"]:
        for number, name in zip(group["params"], group["param_names"], strict=True):
            entries = optimizer_state["state"].get(number, {})
            shared = {entry: value for entry, value in entries.items() if isinstance(value, DTensor)}
            tensors |= {f"{MOMENTS}{name}.{entry}": value for entry, value in shared.items()}
            kept[number] = {entry: value for entry, value in entries.items() if entry not in shared}
    return {**optimizer_state, "state": kept}

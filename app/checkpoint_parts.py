"""Tensors that several processes have written into one checkpoint, each its part of them.

The files are those of torch's distributed checkpointing (DCP) in its Hugging Face format: safetensors whose header says
at which offsets of the whole tensor each block lies. An index beside them saves readers from opening them all.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from modules.weights import DTYPES, Spec, Weights
from modules.world import Region

INDEX = "tensors.json"
MOMENTS = "optimizer."
"""What names of the optimizer's tensors begin with: `optimizer.PARAMETER.ENTRY`."""
_OFFSETS, _NAMED_OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Keys of DCP's metadata in a file's header."""


@dataclass(frozen=True)
class Block:
    """A part of a tensor: the file that holds it, where in the whole it begins, and its shape."""

    file: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass
class TensorIndex:
    """What is known of a tensor that lies in parts: its type of numbers (safetensors' name), and its blocks."""

    dtype: str
    blocks: list[Block] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        ends = [[a + b for a, b in zip(block.offsets, block.shape, strict=True)] for block in self.blocks]
        return tuple(max(sizes) for sizes in zip(*ends, strict=True))


Index = dict[str, TensorIndex]


def index_of(files: Sequence[Path]) -> Index:
    """The index of what these files hold."""
    index: Index = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            offsets = json.loads(file.metadata()[_OFFSETS])
            for name in file.offset_keys():
                part = file.get_slice(name)
                entry = index.setdefault(name, TensorIndex(part.get_dtype()))
                begins = tuple(offsets[name][_NAMED_OFFSETS])
                entry.blocks.append(Block(path.name, begins, tuple(part.get_shape())))
    return index


def merged(indices: Sequence[Index]) -> Index:
    """The index of all processes' files."""
    whole: Index = {}
    for index in indices:
        for name, entry in index.items():
            whole.setdefault(name, TensorIndex(entry.dtype)).blocks.extend(entry.blocks)
    for name, entry in whole.items():
        found = sum(math.prod(block.shape) for block in entry.blocks)
        if found != math.prod(entry.shape):
            raise OSError(f"{name} has {found} entries in its parts, and {math.prod(entry.shape)} as a whole")
    return whole


def write_index(path: Path, index: Index) -> None:
    """Write an index as JSON."""
    path.write_text(json.dumps({name: asdict(entry) for name, entry in index.items()}), encoding="utf-8")


def files_of(folder: Path) -> set[str]:
    """The files that the index of a checkpoint names."""
    entries = json.loads((folder / INDEX).read_text(encoding="utf-8")).values()
    return {block["file"] for entry in entries for block in entry["blocks"]}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on the disk, in parts. `tensor[region]` reads a block of it, from the files that have some of it."""

    name: str
    index: TensorIndex
    folder: "PartedTensors"

    @cached_property
    def shape(self) -> torch.Size:
        """Of the whole."""
        return torch.Size(self.index.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Its type of numbers."""
        return DTYPES[self.index.dtype]

    def __getitem__(self, region: Region) -> Tensor:
        bounds = [part.indices(size)[:2] for part, size in zip(region, self.shape, strict=True)]
        found = torch.empty([end - begin for begin, end in bounds], dtype=self.dtype)
        for block in self.index.blocks:
            overlap = [
                (max(begin, offset), min(end, offset + size))
                for (begin, end), offset, size in zip(bounds, block.offsets, block.shape, strict=True)
            ]
            if all(begin < end for begin, end in overlap):
                here = tuple(slice(a - begin, b - begin) for (a, b), (begin, _) in zip(overlap, bounds, strict=True))
                there = tuple(slice(a - at, b - at) for (a, b), at in zip(overlap, block.offsets, strict=True))
                found[here] = self.folder.open(block.file).get_slice(self.name)[there]
        return found

    def whole(self) -> Tensor:
        """All of it."""
        return self[tuple(slice(0, size) for size in self.shape)]


class PartedTensors:
    """The tensors of a checkpoint in parts, by name; files are opened when they are needed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, dict[str, Any]()
        entries: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self.tensors = {
            name: StoredTensor(name, TensorIndex(entry["dtype"], [_block(block) for block in entry["blocks"]]), self)
            for name, entry in entries.items()
        }

    def open(self, name: str) -> Any:
        """One of the files, by memory map."""
        if name not in self._files:
            self._files[name] = safe_open(self._folder / name, framework="pt")
        return self._files[name]


def give_back(state: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Put the optimizer's tensors into the state that was stored without them; returns the others, the weights."""
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(MOMENTS)}
    for optimizer in state["optimizer_states"]:
        numbers = {
            name: number
            for group in optimizer["param_groups"]
            for name, number in zip(group["param_names"], group["params"], strict=True)
        }
        for key in tensors.keys() - weights.keys():
            parameter, entry = key.removeprefix(MOMENTS).rsplit(".", 1)
            optimizer["state"][numbers[parameter]][entry] = tensors[key]
    return weights


def open_parted_weights(folder: Path) -> Weights:
    """The network's weights as whole tensors, put together one by one."""
    tensors = {name: t for name, t in PartedTensors(folder).tensors.items() if not name.startswith(MOMENTS)}
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return Weights(specs, lambda name: tensors[name].whole())


def _block(entry: dict[str, Any]) -> Block:
    return Block(entry["file"], tuple(entry["offsets"]), tuple(entry["shape"]))

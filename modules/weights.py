"""Weights by name, read and written one tensor at a time, in safetensors files.

A file is written in one pass without holding more than one tensor, which the safetensors library does not offer; it is
read through that library, by memory map. Format: https://github.com/huggingface/safetensors#format.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modules.errors import InputError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}
"""Types of numbers by their names in a file."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size in memory and on the disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Weights:
    """Tensors by name: all specs are known, each tensor comes when it is asked for."""

    specs: Mapping[str, Spec]
    read: Callable[[str], Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Weights":
        """Tensors at hand."""
        return cls({name: Spec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}, tensors.__getitem__)

    def cast(self, dtype: torch.dtype) -> "Weights":
        """The same with every floating-point tensor in another type."""

        def kept(spec: Spec) -> torch.dtype:
            return dtype if spec.dtype.is_floating_point else spec.dtype

        specs = {name: Spec(kept(spec), spec.shape) for name, spec in self.specs.items()}

        def read(name: str) -> Tensor:
            tensor = self.read(name)
            cast = tensor.to(specs[name].dtype)
            if specs[name].dtype == torch.float16 and cast.isinf().any() and not tensor.isinf().any():
                raise InputError(
                    f"dtype=float16 cannot hold {name}, whose largest entry is {tensor.abs().max().item():.3g} (the "
                    "limit is 65504); use bfloat16 or float32"
                )
            return cast

        return Weights(specs, read)

    def renamed(self, names: Mapping[str, str]) -> "Weights":
        """The tensors that `names` lists, new name by new name, under their new names and in that order."""
        return Weights({new: self.specs[old] for new, old in names.items()}, lambda name: self.read(names[name]))

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, one after the other."""
        return ((name, self.read(name)) for name in self.specs)


def write_safetensors(path: Path, weights: Weights, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file whose tensors stand in the order of `weights.specs`, holding one of them at a time.

    Raises:
        FileExistsError: `path` is there already.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, spec in weights.specs.items():
        begin, end = end, end + spec.num_bytes
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in weights.specs:
            _append(file, weights, name)


def _append(file: BinaryIO, weights: Weights, name: str) -> None:
    """Write one tensor; a function of its own, so that it is gone when the next one is read."""
    tensor = weights.read(name)
    found = Spec(tensor.dtype, tuple(tensor.shape))
    assert found == weights.specs[name], f"{name} is {found} and was announced as {weights.specs[name]}"
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if len(flat):
        file.write(flat.view(torch.uint8).numpy().data)


def open_safetensors(path: Path) -> Weights:
    """The tensors of a file, by memory map: reading one takes no memory of the process until it is used.

    Raises:
        InputError: no file, a truncated one, one that is not safetensors, or types of numbers that are not supported.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error}); copy or download it again") from None
    for name, (dtype, _) in found.items():
        if dtype not in DTYPES:
            raise InputError(
                f"{path}: tensor {name} has numbers of type {dtype}, and only {', '.join(DTYPES)} are read; "
                "give an unquantized model"
            )
    file = safe_open(path, framework="pt")
    return Weights({name: Spec(DTYPES[dtype], shape) for name, (dtype, shape) in found.items()}, file.get_tensor)

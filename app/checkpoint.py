"""Checkpoints on disk: a directory that is complete or not there.

    step-00000300/            files are written to step-00000300.tmp-<random>, fsynced, and renamed
        weights.safetensors   the network's weights, under the names of `Transformer.state_dict()`
        state.pt              the rest of Lightning's checkpoint: optimizer, schedule, loops, callbacks, data position;
                              an imported model has none
        tokenizer.json        so that a checkpoint generates and evaluates by itself; an imported model may have none
        manifest.json         format version, bytes and sha256 of each file, and the metadata; written last

Where several processes have written it, each its part, there is instead of weights.safetensors (`checkpoint_parts`)

        shard-00001-model-00001-of-00002.safetensors    the first process's part of the weights
        shard-00001-model-00002-of-00002.safetensors    ... and of the optimizer's moments, which state.pt then lacks;
                              more files where they would be larger than about 1 GiB
        tensors.json          which block of each tensor is in which file

A checkpoint is valid when its manifest is there and every file matches it. Nothing is ever overwritten. Format version
1 had the weights in state.pt, and is still read; 3 is that in parts.
"""

import hashlib
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.config import MANIFEST
from modules.errors import InputError
from modules.files import publish_directory, whole_directory

if TYPE_CHECKING:
    from app.checkpoint_parts import Index
    from modules.weights import Weights

WHOLE, PARTED = 2, 3
"""Format versions."""
WEIGHTS = "weights.safetensors"
STATE = "state.pt"
TOKENIZER = "tokenizer.json"
SHARED = "all processes must write to one trainer.default_root_dir, on storage that their machines share"
PREFIX = "network."
"""What Lightning's names of weights begin with: the network is one attribute of the LightningModule."""


def write_checkpoint(
    path: Path,
    *,
    weights: "Weights",
    metadata: Mapping[str, Any],
    state: Mapping[str, Any] | None = None,
    tokenizer_json: str | None = None,
) -> None:
    """Write a checkpoint directory: aside, fsynced, then renamed. Weights go to the disk one by one.

    Args:
        weights: the network's, without Lightning's prefix.
        metadata: JSON types; `architecture` is what a network is built from.
        state: Lightning's checkpoint without its weights; none for a model that was not trained here.

    Raises:
        FileExistsError: `path` is there already.
    """
    from modules.weights import write_safetensors

    if path.exists():
        raise FileExistsError(f"checkpoint {path} exists already, and checkpoints are never overwritten")
    with whole_directory(path) as aside:
        write_safetensors(aside / WEIGHTS, weights)
        _write_rest(aside, state, tokenizer_json)
        _write_manifest(aside, WHOLE, {}, metadata)


def publish_parts(
    aside: Path,
    path: Path,
    *,
    files: Mapping[str, dict[str, Any]],
    index: "Index",
    metadata: Mapping[str, Any],
    state: Mapping[str, Any],
    tokenizer_json: str,
) -> None:
    """Complete the directory into which several processes have written their parts, and give it its name.

    Args:
        aside: the directory.
        path: its name as a checkpoint.
        files: the fingerprints of the parts (`fingerprint`), by name.
        index: which block of each tensor is in which of them.
        metadata, state, tokenizer_json: as for `write_checkpoint`.

    Raises:
        OSError: parts that other processes have written are not seen from here, or not all of them.
    """
    from app.checkpoint_parts import INDEX, write_index

    for name, expected in files.items():
        size = (aside / name).stat().st_size if (aside / name).is_file() else 0
        if size != expected["bytes"]:
            raise OSError(f"of {name} the first process sees {size} bytes of {expected['bytes']}: {SHARED}")
    write_index(aside / INDEX, index)
    _write_rest(aside, state, tokenizer_json)
    _write_manifest(aside, PARTED, files, metadata)
    publish_directory(aside, path)


def _write_rest(folder: Path, state: Mapping[str, Any] | None, tokenizer_json: str | None) -> None:
    import torch

    if state is not None:
        with (folder / STATE).open("wb") as file:
            torch.save(dict(state), file)
    if tokenizer_json is not None:
        (folder / TOKENIZER).write_text(tokenizer_json, encoding="utf-8")


def _write_manifest(
    folder: Path, version: int, known: Mapping[str, dict[str, Any]], metadata: Mapping[str, Any]
) -> None:
    """The manifest of what is known and of all other files that are there."""
    others = {file.name: fingerprint(file) for file in sorted(folder.iterdir()) if file.name not in known}
    manifest = {"format_version": version, "files": {**known, **others}, "metadata": dict(metadata)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")


def split_state(checkpoint: Mapping[str, Any]) -> tuple["Weights", dict[str, Any]]:
    """Lightning's checkpoint as `write_checkpoint` takes it: weights, and the rest."""
    from modules.weights import Weights

    tensors = checkpoint["state_dict"]
    assert all(name.startswith(PREFIX) for name in tensors), "all weights are the network's"
    weights = Weights.of({name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})
    return weights, {key: value for key, value in checkpoint.items() if key != "state_dict"}


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a checkpoint, after checking that it is one and that its files have their sizes.

    Raises:
        InputError: no checkpoint, a newer format, or a broken one.
    """
    return _read_manifest(path)["metadata"]


def verify(path: Path) -> None:
    """Compare every file with its sha256; raises `InputError` naming the first that differs.

    A process does so once, as long as nothing writes to the files.
    """
    from app.checkpoint_parts import INDEX, files_of

    files = {name: entry["sha256"] for name, entry in _read_manifest(path)["files"].items()}
    try:
        stats = [(path / name).stat() for name in files]
    except OSError as error:
        raise InputError(f"checkpoint {path} is damaged: a file cannot be read ({error}); use another") from None
    _compare(path, tuple(files.items()), tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats))
    unlisted = sorted(files_of(path) - files.keys()) if INDEX in files else []
    if unlisted:
        raise InputError(f"checkpoint {path} is damaged: {unlisted[0]} is missing in {MANIFEST}; use an older one")


@lru_cache(maxsize=16)
def _compare(path: Path, files: Sequence[tuple[str, str]], stats: Sequence[tuple[int, int, int]]) -> None:
    """Compare files with their sha256; `stats` tells whether they may have changed since."""
    for name, expected in files:
        try:
            found = fingerprint(path / name)["sha256"]
        except OSError as error:
            raise InputError(f"checkpoint {path} is damaged: {name} cannot be read ({error}); use another") from None
        if found != expected:
            raise InputError(
                f"checkpoint {path} is damaged: {name} does not match its sha256; use an older checkpoint beside it"
            )


def open_weights(path: Path) -> "Weights":
    """The network's weights, verified, read one by one from a memory map."""
    import torch

    from app.checkpoint_parts import INDEX, open_parted_weights
    from modules.weights import open_safetensors

    verify(path)
    if (path / INDEX).is_file():
        return open_parted_weights(path)
    if (path / WEIGHTS).is_file():
        return open_safetensors(path / WEIGHTS)
    state = torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=True)
    return split_state(state)[0]


def load_state(path: Path, map_location: Any = "cpu", lazy: bool = False) -> dict[str, Any]:
    """Lightning's checkpoint dictionary, verified, and read with `weights_only` (no pickled code runs).

    Args:
        lazy: for those who want parts of it: tensors are mapped, or `checkpoint_parts.StoredTensor`s, of both of which
            `tensor[region]` reads that block alone.

    Raises:
        InputError: a damaged checkpoint, or one without a run's state: an imported model.
    """
    import torch

    from app.checkpoint_parts import INDEX, PartedTensors, give_back

    verify(path)
    require_state(path)
    state = torch.load(path / STATE, map_location=map_location, weights_only=True, mmap=lazy)
    if (path / INDEX).is_file():
        parts = PartedTensors(path)
        tensors: dict[str, Any] = dict(parts.tensors)
        if not lazy:
            tensors = {name: tensor.whole().to(map_location) for name, tensor in tensors.items()}
        weights = give_back(state, tensors)
    else:
        weights = dict(open_weights(path).items())
    return state | {"state_dict": {PREFIX + name: tensor for name, tensor in weights.items()}}


def digest(path: Path) -> str:
    """What tells one checkpoint from another: the sha256 of its manifest, which holds those of its files."""
    return fingerprint(path / MANIFEST)["sha256"]


def has_state(path: Path) -> bool:
    """Whether a run can continue from the checkpoint."""
    return (path / STATE).is_file()


def require_state(path: Path) -> None:
    """Raise `InputError` for an imported model, which holds no run to continue."""
    if not has_state(path):
        raise InputError(
            f"checkpoint {path} holds weights alone (it was imported), and no run to continue; start a run from it "
            "with --model.start_from instead of --ckpt_path"
        )


def read_tokenizer_json(path: Path) -> str | None:
    """The text of the checkpoint's tokenizer.json, where it has one."""
    return (path / TOKENIZER).read_text(encoding="utf-8") if (path / TOKENIZER).is_file() else None


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, its manifest first: an interrupted deletion leaves nothing that looks valid."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def library_versions() -> dict[str, str]:
    """Versions that matter for reading a checkpoint or repeating a run."""
    import lightning
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "lightning": lightning.__version__}


def _read_manifest(path: Path) -> dict[str, Any]:
    if "://" in str(path):
        raise InputError(f"checkpoint {path} is an address, and only local directories are read; copy it here first")
    if not (path / MANIFEST).is_file():
        raise InputError(
            f"{path} is not a checkpoint: it holds no {MANIFEST}; give a directory such as RUN/checkpoints/step-…"
        )
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, files = int(manifest["format_version"]), dict(manifest["files"])
        manifest["metadata"]["architecture"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"checkpoint {path} is damaged: {MANIFEST} cannot be read ({error}); use an older one"
        ) from None
    if version > PARTED:
        raise InputError(
            f"checkpoint {path} has format version {version}, and this growmoe reads up to {PARTED}; update growmoe"
        )
    for name, expected in files.items():
        size = (path / name).stat().st_size if (path / name).is_file() else 0
        if size != expected["bytes"]:
            raise InputError(
                f"checkpoint {path} is damaged: {name} has {size} bytes instead of {expected['bytes']}; "
                "use an older one"
            )
    return manifest


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, as in a manifest."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}

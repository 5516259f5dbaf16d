"""A directory in the format of Hugging Face as a model of ours. Everything is checked before a tensor is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.config import ModelConfig
from modules.errors import InputError
from modules.hugging_face.configs import find_family, read_config, read_json
from modules.hugging_face.tensors import to_ours
from modules.hugging_face.tokenizer_files import SIDE_FILES, begin_ids, end_ids, special_ids
from modules.weights import Spec, Weights, open_safetensors

CONFIG, TOKENIZER, SINGLE, INDEX = "config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class HuggingFaceModel:
    """A model of a Hugging Face directory, in our terms.

    Attributes:
        family: its `model_type`, or the family that was asked for.
        config: its architecture.
        weights: its tensors under the names of `Transformer.state_dict()`; each is read when it is asked for.
        tokenizer_json: the text of its tokenizer.json, if it has one.
        origin: what an export writes back, and what generation needs to know, in JSON types: `family`, `files` (texts
            of small files by name), `begin_ids` (what stands in front of every text), `end_ids` (what ends one) and
            `token_ids` (special ids of config.json).
        notes: what the user should know, a line each.
    """

    family: str
    config: ModelConfig
    weights: Weights
    tokenizer_json: str | None
    origin: dict[str, Any]
    notes: tuple[str, ...] = ()


def open_directory(path: Path, family: str | None = None) -> HuggingFaceModel:
    """Open a directory with config.json and safetensors files.

    Args:
        path: the directory.
        family: read it as a model of this family, whatever config.json calls it.

    Raises:
        InputError: a file, key or tensor is missing or not what it must be, or the model is one that growmoe cannot be.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a directory; download the model first, and give the folder with {CONFIG}")
    if not (path / CONFIG).is_file():
        raise InputError(f"{path} holds no {CONFIG}; give the folder of a model in the format of Hugging Face")
    record = read_json(path / CONFIG)
    found = find_family(record, path / CONFIG, family)
    config = read_config(record, path / CONFIG, found)
    weights = to_ours(_open_weights(path), found, config, str(path))
    tokenizer_json = _read_text(path / TOKENIZER) if (path / TOKENIZER).is_file() else None
    files = {name: _read_text(path / name) for name in SIDE_FILES if (path / name).is_file()}
    read = {name: read_json(path / name) for name in files if name.endswith(".json")}
    token_ids = special_ids(record, str(path / CONFIG))
    generation = special_ids(read.get("generation_config.json", {}), str(path / "generation_config.json"))
    origin = {
        "family": found.name,
        "files": files,
        "begin_ids": [] if tokenizer_json is None else begin_ids(tokenizer_json, str(path / TOKENIZER)),
        "end_ids": end_ids(generation, token_ids),
        "token_ids": token_ids,
    }
    return HuggingFaceModel(found.name, config, weights, tokenizer_json, origin, tuple(_notes(config, record)))


def _notes(config: ModelConfig, record: Mapping[str, Any]) -> list[str]:
    longest = record["max_position_embeddings"]
    if config.max_seq_len == longest:
        return []
    return [
        f"attention slides over a window of {config.max_seq_len} tokens, inside which growmoe is exact: max_seq_len is "
        f"{config.max_seq_len} instead of {longest}"
    ]


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({error}); copy or download it again") from None


# -- weight files ------------------------------------------------------------------------------------------------------


def _open_weights(path: Path) -> Weights:
    """All tensors of a directory, under their names in its files."""
    if (path / SINGLE).is_file():
        return open_safetensors(path / SINGLE)
    if (path / INDEX).is_file():
        return _open_indexed(path)
    files = sorted(path.glob("*.safetensors"))
    if files:
        return _merged({file.name: open_safetensors(file) for file in files}, {}, path)
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    if pickled:
        raise InputError(
            f"{path} has weights only as {pickled[0]}, which could run code when it is read; convert it to safetensors "
            "(in transformers: load it and save_pretrained)"
        )
    raise InputError(f"{path} holds no weights (*.safetensors); download them too")


def _open_indexed(path: Path) -> Weights:
    places = read_json(path / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise InputError(f"{path / INDEX} has no weight_map from tensors to files; copy or download it again")
    shards = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise InputError(f"{path / INDEX} names the file {name}, outside its directory; correct it")
        if not (path / name).is_file():
            raise InputError(f"{path / name} is missing, and {INDEX} lists it; copy or download it too")
        shards[name] = open_safetensors(path / name)
    for tensor, name in places.items():
        if tensor not in shards[name].specs:
            raise InputError(f"{path / name} lacks the tensor {tensor}, which {INDEX} places there; download it again")
    return _merged(shards, places, path)


def _merged(shards: Mapping[str, Weights], places: Mapping[str, str], path: Path) -> Weights:
    """The tensors of several files; of one that several hold, that of the file where `places` has it."""
    found: dict[str, Weights] = {}
    specs: dict[str, Spec] = {}
    for file, shard in shards.items():
        for name, spec in shard.specs.items():
            if places.get(name, file) != file:
                continue
            if name in found:
                raise InputError(f"{path / file} holds the tensor {name}, as another file does; keep one of the files")
            found[name], specs[name] = shard, spec
    return Weights(specs, lambda name: found[name].read(name))

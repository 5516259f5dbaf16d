"""A model of ours as a directory in the format of Hugging Face: complete, or not there."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.config import ModelConfig
from modules.errors import InputError
from modules.files import whole_directory
from modules.hugging_face.configs import choose_family, write_config
from modules.hugging_face.reading import CONFIG, INDEX, SINGLE, TOKENIZER
from modules.hugging_face.tensors import shards_of, to_theirs
from modules.hugging_face.tokenizer_files import TOKEN_IDS, dump, own_files, with_begin_token
from modules.weights import Weights, write_safetensors

Origin = Mapping[str, Any]


def write_directory(
    output: Path,
    *,
    config: ModelConfig,
    weights: Weights,
    tokenizer_json: str | None,
    origin: Origin | None,
    family: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> str:
    """Write a model with its tokenizer, aside and then renamed, one tensor at a time; returns the family.

    Args:
        output: the directory, which must not exist yet.
        config: the architecture.
        weights: the tensors, under our names; their types are kept.
        tokenizer_json: text of the tokenizer.json, if there is one.
        origin: that of the `HuggingFaceModel` that the model came from; None for a model that was trained here.
        family: write it as one of this family; left out, the origin's if it fits, or else the first that fits.
        max_shard_bytes: of tensors in a file at most, unless one alone is larger.

    Raises:
        InputError: `output` exists, or no family (or not the wanted one) expresses the model.
    """
    if output.exists():
        raise InputError(f"output={output} exists, and nothing is overwritten; choose another name")
    chosen = choose_family(config, None if origin is None else origin["family"], family)
    theirs = to_theirs(weights, chosen, config)
    texts, token_ids = _token_files(tokenizer_json, origin, config.max_seq_len)
    texts[CONFIG] = dump(write_config(config, chosen, _common_dtype(weights), token_ids))
    with whole_directory(output) as aside:
        _write_tensors(aside, theirs, max_shard_bytes)
        for name, text in texts.items():
            (aside / name).write_bytes(text.encode())
    return chosen.name


def _token_files(
    tokenizer_json: str | None, origin: Origin | None, max_seq_len: int
) -> tuple[dict[str, str], dict[str, Any]]:
    """The texts of all files about tokens, and the special ids for config.json."""
    if origin is None:
        ids: dict[str, Any] = {}
        if tokenizer_json is not None:
            tokenizer_json, ids = with_begin_token(tokenizer_json)
        files = own_files(tokenizer_json, ids, max_seq_len)
    else:
        ids = dict(origin["token_ids"])
        given = {name: ids[name] for name in TOKEN_IDS if ids.get(name) is not None}
        files = {"generation_config.json": dump(given), **origin["files"]}
    return files | ({} if tokenizer_json is None else {TOKENIZER: tokenizer_json}), ids


def _common_dtype(weights: Weights) -> str:
    """The type of most numbers, as config.json calls it."""
    numbers: Counter[str] = Counter()
    for spec in weights.specs.values():
        numbers[str(spec.dtype).removeprefix("torch.")] += spec.num_bytes
    return numbers.most_common(1)[0][0]


def _write_tensors(path: Path, theirs: Weights, max_shard_bytes: int) -> None:
    shards = shards_of(theirs.specs, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(path / SINGLE, theirs, {"format": "pt"})
        return
    places = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places.update(dict.fromkeys(names, file))
        write_safetensors(path / file, theirs.renamed({name: name for name in names}), {"format": "pt"})
    total = sum(spec.num_bytes for spec in theirs.specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (path / INDEX).write_text(dump(index), encoding="utf-8")

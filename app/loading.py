"""Models to use: the checkpoints of runs, and directories in Hugging Face's format."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.checkpoint import MANIFEST, open_weights, read_metadata, read_tokenizer_json
from callbacks.evaluation.text_side import TextSide
from datamodules.tokenizer import Tokenizer
from modules.config import ModelConfig
from modules.errors import InputError
from modules.layers.transformer import Transformer
from modules.weights import Weights

HUGGING_FACE_CONFIG = "config.json"


@dataclass(frozen=True)
class LoadedModel:
    """A network (evaluation mode, CPU), and what is needed to give it text.

    `begin_ids` go in front of every prompt, and may be none; each of `end_ids` ends a text.
    """

    network: Transformer
    tokenizer: Tokenizer | None
    metadata: dict[str, Any]
    begin_ids: list[int]
    end_ids: list[int]


def load_model(path: Path, dtype: torch.dtype = torch.float32, tokenizer_file: Path | None = None) -> LoadedModel:
    """The model in a directory: a checkpoint (it has manifest.json) or a Hugging Face model (it has config.json).

    Args:
        path: the directory.
        dtype: the type of numbers that the weights are converted to, one by one.
        tokenizer_file: a tokenizer.json to use instead of the model's own.

    Raises:
        InputError: neither kind; a damaged checkpoint; a model that is not supported; a tokenizer that does not fit.
    """
    tokenizer_json: str | None
    if (path / MANIFEST).is_file():
        metadata, weights, tokenizer_json = read_metadata(path), open_weights(path), read_tokenizer_json(path)
        config = ModelConfig.from_dict(metadata["architecture"])
    elif (path / HUGGING_FACE_CONFIG).is_file():
        from modules.hugging_face import open_directory

        found = open_directory(path)
        metadata = {"architecture": found.config.to_dict(), "origin": found.origin}
        config, weights, tokenizer_json = found.config, found.weights, found.tokenizer_json
    else:
        raise InputError(
            f"{path} holds no model: there is neither {MANIFEST} of a checkpoint in it, nor {HUGGING_FACE_CONFIG} of a "
            "Hugging Face model; give a directory such as RUN/checkpoints/step-… or a downloaded model's"
        )
    origin = metadata.get("origin") or {}
    if tokenizer_file is not None:
        tokenizer_json, origin = replace_tokenizer(tokenizer_file, config.vocab_size, tokenizer_json, origin)
    tokenizer, begin_ids, end_ids = _tokens_around(
        f"tokenizer of {path}" if tokenizer_file is None else f"tokenizer={tokenizer_file}",
        origin,
        tokenizer_json,
        config.vocab_size,
    )
    return LoadedModel(build_network(config, weights, dtype), tokenizer, metadata, begin_ids, end_ids)


def text_side(model: LoadedModel, path: Path) -> TextSide:
    """Its tokenizer, and what it expects around a text. Raises `InputError` for a model without a tokenizer."""
    if model.tokenizer is None:
        raise InputError(f"{path} has no tokenizer, and tasks are text; import it again with --tokenizer FILE")
    origin = model.metadata.get("origin") or {}
    prefix = origin.get("token_ids", {}).get("bos_token_id")
    return TextSide(model.tokenizer, model.begin_ids, prefix, model.end_ids or None)


def build_network(config: ModelConfig, weights: Weights, dtype: torch.dtype = torch.float32) -> Transformer:
    """The network with these weights, in evaluation mode; nothing is drawn, and no weight is there twice for long."""
    with torch.device("meta"):
        network = Transformer(config)
    network.load_state_dict(dict(weights.cast(dtype).items()), assign=True)
    return network.eval()


def replace_tokenizer(
    path: Path, vocab_size: int, before: str | None, origin: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The text of a tokenizer.json to use instead of a model's own, and the origin that the model has with it.

    Args:
        path: the tokenizer.json.
        vocab_size: that of the model.
        before: text of the model's own tokenizer.json, if it has one.
        origin: where the model came from; empty for a model that was trained here, as is then what is returned.

    Raises:
        InputError: no tokenizer.json, or one with ids outside the model's vocabulary.
    """
    from modules.hugging_face.tokenizer_files import largest_id, with_tokenizer

    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"tokenizer={path} cannot be read as text ({error}); give a tokenizer.json") from None
    largest = largest_id(text, f"tokenizer={path}")
    if largest >= vocab_size:
        raise InputError(
            f"tokenizer={path} gives ids up to {largest}, and the model's vocabulary has {vocab_size} entries; "
            "give the model's own tokenizer.json"
        )
    return text, with_tokenizer(origin, before, text, f"tokenizer={path}") if origin else {}


def _tokens_around(
    where: str, origin: Mapping[str, Any], tokenizer_json: str | None, vocab_size: int
) -> tuple[Tokenizer | None, list[int], list[int]]:
    """Tokenizer, begin tokens and end tokens: as the origin has them, or end-of-text for both."""
    begin_ids = list(origin["begin_ids"]) if origin else []
    end_ids = list(origin["end_ids"]) if origin else []
    if tokenizer_json is None:
        return None, begin_ids, end_ids
    outside = next((index for index in end_ids if not 0 <= index < vocab_size), None)
    if outside is not None:
        raise InputError(
            f"{where}: end-of-text token {outside} is outside the model's vocabulary of {vocab_size}; "
            "give the model's own tokenizer.json with --tokenizer FILE"
        )
    try:
        eos_id = next(iter([*end_ids, *begin_ids]), None)
        tokenizer = Tokenizer.from_json(tokenizer_json, eos_id, strict=not origin)
        eos = [] if origin else [tokenizer.eos_id]
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return (tokenizer, begin_ids, end_ids) if origin else (tokenizer, eos, eos)

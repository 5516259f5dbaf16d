"""`growmoe import` and `growmoe export`: models and tokenizers in the format of Hugging Face, both ways."""

import math
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from app.outputs import check_new_output
from modules.errors import InputError

if TYPE_CHECKING:
    from modules.weights import Weights

Dtype = Literal["keep", "float32", "bfloat16", "float16"]
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def import_(
    source: Path,
    *,
    output: Path,
    family: str | None = None,
    tokenizer: Path | None = None,
    dtype: Dtype = "keep",
) -> None:
    """Turn a Hugging Face model (config.json, safetensors, tokenizer.json) into a checkpoint.

    Reads llama, mistral, qwen2, qwen3, olmo2, mixtral, qwen2_moe, qwen3_moe, olmoe and aquilamoe. No code that comes
    with a model is run.

    Args:
        source: the model's directory.
        output: the new checkpoint's directory, which must not exist yet.
        family: read the model as one of this family, whatever its config.json calls it.
        tokenizer: a tokenizer.json to use instead of the directory's own.
        dtype: the type of the stored weights; keep leaves each as it is.
    """
    from app.checkpoint import library_versions, write_checkpoint
    from modules.hugging_face import open_directory

    started = time.perf_counter()
    check_new_output(output)
    model = open_directory(source, family)
    tokenizer_json, origin = model.tokenizer_json, model.origin
    if tokenizer is not None:
        from app.loading import replace_tokenizer

        tokenizer_json, origin = replace_tokenizer(tokenizer, model.config.vocab_size, tokenizer_json, origin)
    weights = _cast(model.weights, dtype)
    architecture = model.config.to_dict()
    metadata = {
        "step": 0,
        "tokens": 0,
        "stage": 0,
        "architecture": architecture,
        "initial_architecture": architecture,
        "applied_transitions": [],
        "transition_records": [],
        "factors": {},
        "origin": origin,
        "data": None,
        "versions": library_versions(),
    }
    write_checkpoint(output, weights=weights, metadata=metadata, tokenizer_json=tokenizer_json)
    notes = list(model.notes)
    if tokenizer_json is None:
        notes.append("no tokenizer.json: generation needs one, and import takes it with --tokenizer FILE")
    _report(model.family, weights, started, [*notes, str(output)])


def export(
    checkpoint: Path,
    *,
    output: Path,
    family: str | None = None,
    dtype: Dtype = "keep",
    max_shard_size: str = "5GB",
) -> None:
    """Write the model and tokenizer of a checkpoint as a directory that transformers, vLLM and others read.

    The family is the one that the model came from, or else the first standard one that is the same function.

    Args:
        checkpoint: the directory of a checkpoint, such as RUN/checkpoints/step-00000300.
        output: the new directory, which must not exist yet.
        family: write it as a model of this family; refused where that would be another function.
        dtype: the type of the written weights; keep leaves each as it is.
        max_shard_size: of a file of weights at most, such as 5GB or 500MB.
    """
    from app.checkpoint import open_weights, read_metadata, read_tokenizer_json
    from modules.config import ModelConfig
    from modules.hugging_face import write_directory

    started = time.perf_counter()
    max_shard_bytes = _bytes(max_shard_size)
    metadata = read_metadata(checkpoint)
    check_new_output(output)
    weights = _cast(open_weights(checkpoint), dtype)
    written = write_directory(
        output,
        config=ModelConfig.from_dict(metadata["architecture"]),
        weights=weights,
        tokenizer_json=read_tokenizer_json(checkpoint),
        origin=metadata.get("origin"),
        family=family,
        max_shard_bytes=max_shard_bytes,
    )
    _report(written, weights, started, [str(output)])


def _cast(weights: "Weights", dtype: Dtype) -> "Weights":
    import torch

    return weights if dtype == "keep" else weights.cast(getattr(torch, dtype))


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", size.strip().upper())
    number = float(match[1]) * _UNITS[match[2] or ""] if match else 0.0
    if not 1 <= number < math.inf:
        shown = size if len(size) <= 40 else f"{size[:40]}..."
        raise InputError(f"max_shard_size={shown} is not a size; give one such as 5GB or 500MB")
    return int(number)


def _report(family: str, weights: "Weights", started: float, lines: list[str]) -> None:
    import torch

    parameters = sum(torch.Size(spec.shape).numel() for spec in weights.specs.values())
    size = sum(spec.num_bytes for spec in weights.specs.values())
    first = f"{family}: {parameters / 1e6:.2f}M parameters, {size / 1e6:.1f} MB, {time.perf_counter() - started:.1f} s"
    sys.stdout.write("\n".join([first, *lines]) + "\n")

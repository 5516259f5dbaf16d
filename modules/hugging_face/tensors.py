"""A directory's tensors under our names, checked against config.json before any is read, and a model's under theirs."""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from modules.config import ModelConfig
from modules.errors import InputError
from modules.hugging_face.families import Family
from modules.hugging_face.layout import Piece, pieces
from modules.weights import Spec, Weights

_HARMLESS = re.compile(r"rotary_emb\.inv_freq$")
"""Buffers that older versions of transformers saved, and that follow from config.json."""
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def to_ours(theirs: Weights, family: Family, config: ModelConfig, source: str) -> Weights:
    """The tensors of a model of ours, each put together from the family's when it is read.

    Raises:
        InputError: tensors that are missing, misshapen, not floating-point numbers, or not part of the model.
    """
    theirs = _without_aliases(theirs, family)
    specs: dict[str, Spec] = {}
    readers: dict[str, Callable[[], Tensor]] = {}
    seen: set[str] = set()
    for piece in pieces(family, config):
        if piece.ours is None:
            names: Iterable[str] = [piece.theirs] if piece.idle else []
        else:
            names, dtype, readers[piece.ours] = _reader(piece, theirs, source)
            specs[piece.ours] = Spec(dtype, piece.shape)
        seen.update(names)
    _check_rest(theirs, seen, config, family, source)
    return Weights(specs, lambda name: readers[name]())


def to_theirs(ours: Weights, family: Family, config: ModelConfig) -> Weights:
    """The tensors of a family's files, each cut from ours when it is read; the last of ours that was read is kept."""
    specs: dict[str, Spec] = {}
    readers: dict[str, Callable[[], Tensor]] = {}
    last: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if name not in last:
            last.clear()
            last[name] = ours.read(name)
        return last[name]

    for piece in pieces(family, config):
        if piece.ours is None:
            spec = Spec(ours.specs["embedding.weight"].dtype, piece.shape)
            specs[piece.theirs], readers[piece.theirs] = spec, _zeros(spec)
            continue
        found = ours.specs[piece.ours]
        assert found.shape == piece.shape, f"{piece.ours} is {found.shape}, and the configuration says {piece.shape}"
        if piece.part is None:
            specs[piece.theirs], readers[piece.theirs] = found, _whole(read, piece.ours)
            continue
        for expert, name in enumerate(piece.expert_names):
            specs[name], readers[name] = Spec(found.dtype, piece.expert_shape), _expert(read, piece.ours, expert)
    used = {piece.ours for piece in pieces(family, config)}
    assert used >= set(ours.specs), f"{set(ours.specs) - used} have no place in {family.name}"
    return Weights(specs, lambda name: readers[name]())


# -- reading -----------------------------------------------------------------------------------------------------------


def _without_aliases(theirs: Weights, family: Family) -> Weights:
    names = {}
    for old in theirs.specs:
        new = old
        for alias, name in family.aliases.items():
            new = new.replace(alias, name)
        names[new] = old
    return theirs.renamed(names)


def _reader(piece: Piece, theirs: Weights, source: str) -> tuple[Iterable[str], torch.dtype, Callable[[], Tensor]]:
    """The tensors that a piece is made of, its type, and how it is made."""
    if piece.part is None:
        _check(theirs, piece.theirs, piece.shape, source)
        return [piece.theirs], theirs.specs[piece.theirs].dtype, lambda: theirs.read(piece.theirs)
    if piece.stacked_name in theirs.specs:
        _check(theirs, piece.stacked_name, piece.stacked_shape, source)
        return [piece.stacked_name], theirs.specs[piece.stacked_name].dtype, lambda: _unstacked(piece, theirs)
    for name in piece.expert_names:
        _check(theirs, name, piece.expert_shape, source)
    dtype = theirs.specs[piece.expert_names[0]].dtype
    for name in piece.expert_names:
        dtype = torch.promote_types(dtype, theirs.specs[name].dtype)
    return piece.expert_names, dtype, lambda: _stack(piece, theirs, dtype)


def _unstacked(piece: Piece, theirs: Weights) -> Tensor:
    stacked = theirs.read(piece.stacked_name)
    if piece.part != "down":
        half = stacked.shape[1] // 2
        stacked = stacked[:, :half] if piece.part == "gate" else stacked[:, half:]
    return stacked.mT.contiguous()


def _stack(piece: Piece, theirs: Weights, dtype: torch.dtype) -> Tensor:
    experts = torch.empty(piece.shape, dtype=dtype)
    for expert, name in zip(experts, piece.expert_names, strict=True):
        expert.copy_(theirs.read(name).T)
    return experts


def _check(theirs: Weights, name: str, shape: tuple[int, ...], source: str) -> None:
    spec = theirs.specs.get(name)
    if spec is None:
        raise InputError(
            f"{source}: tensor {name} of shape {list(shape)} is missing; copy or download all weights again, "
            "or correct config.json"
        )
    if spec.shape != shape:
        raise InputError(
            f"{source}: tensor {name} has shape {list(spec.shape)}, and config.json makes it {list(shape)}; "
            "use the config.json that belongs to these weights"
        )
    if not spec.dtype.is_floating_point:
        raise InputError(f"{source}: tensor {name} has numbers of type {spec.dtype}; give an unquantized model")


def _check_rest(theirs: Weights, seen: set[str], config: ModelConfig, family: Family, source: str) -> None:
    rest = [name for name, spec in theirs.specs.items() if name not in seen and torch.Size(spec.shape).numel()]
    rest = [name for name in rest if not _HARMLESS.search(name)]
    if config.tie_embeddings and _HEAD in rest:
        rest.remove(_HEAD)
        if not torch.equal(theirs.read(_HEAD), theirs.read(_EMBEDDING).to(theirs.specs[_HEAD].dtype)):
            raise InputError(
                f"{source}: tie_word_embeddings=true, and {_HEAD} is not equal to {_EMBEDDING}; "
                "set tie_word_embeddings=false in config.json to keep both"
            )
    if rest:
        raise InputError(
            f"{source}: tensor {rest[0]} {list(theirs.specs[rest[0]].shape)} (of {len(rest)} such) is no part of the "
            f"{family.name} model of config.json; use the config.json that belongs to these weights"
        )


# -- writing -----------------------------------------------------------------------------------------------------------


def _zeros(spec: Spec) -> Callable[[], Tensor]:
    return lambda: torch.zeros(spec.shape, dtype=spec.dtype)


def _whole(read: Callable[[str], Tensor], name: str) -> Callable[[], Tensor]:
    return lambda: read(name)


def _expert(read: Callable[[str], Tensor], name: str, expert: int) -> Callable[[], Tensor]:
    return lambda: read(name)[expert].T


def shards_of(specs: Mapping[str, Spec], max_shard_bytes: int) -> list[list[str]]:
    """Names by file: in order, each file as full as it may be; a larger tensor has a file of its own."""
    shards: list[list[str]] = []
    size = 0
    for name, spec in specs.items():
        if not shards or size + spec.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.num_bytes
    return shards

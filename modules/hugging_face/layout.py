"""Which tensors a model consists of, under our names and under a family's, from the family's tables."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from modules.config import ModelConfig
from modules.hugging_face.families import Family
from modules.hugging_face.rows import FIRST_ROWS, LAST_ROWS, Part, Row


@dataclass(frozen=True)
class Piece:
    """One of our tensors and where a family's files have it.

    Attributes:
        ours: our name; None where only they have it, and it is zero.
        theirs: their name; of stacked experts with `{expert}` in it.
        shape: our shape. Theirs is the same, or for one of the stacked experts [d, f] of ours [E, f, d].
        part: for stacked experts, which matrix it is.
        idle: whatever theirs holds has no effect where ours is None.
    """

    ours: str | None
    theirs: str
    shape: tuple[int, ...]
    part: Part | None
    idle: bool

    @property
    def expert_names(self) -> list[str]:
        """Their names, expert by expert."""
        return [self.theirs.format(expert=expert) for expert in range(self.shape[0])]

    @property
    def expert_shape(self) -> tuple[int, int]:
        """Their shape of one expert's matrix."""
        return self.shape[2], self.shape[1]

    @property
    def stacked_name(self) -> str:
        """Where transformers 5 has the experts of a layer in one tensor, gate and up in a common one."""
        block = self.theirs.partition(".{expert}")[0]
        return f"{block}.down_proj" if self.part == "down" else f"{block}.gate_up_proj"

    @property
    def stacked_shape(self) -> tuple[int, int, int]:
        """Shape of that tensor: [E, D, F] of down, [E, 2 F, D] of gate and up."""
        num_experts, inner, outer = self.shape
        return (num_experts, outer, inner) if self.part == "down" else (num_experts, 2 * outer, inner)


def pieces(family: Family, config: ModelConfig) -> Iterator[Piece]:
    """Every tensor of a model, in the order of `Transformer.state_dict()`."""
    sizes = _sizes(config)
    yield from _present(FIRST_ROWS, config, _features(config), sizes)
    for layer in range(config.num_layers):
        for piece in _present(family.layer, config, _features(config, layer), sizes):
            ours = None if piece.ours is None else f"blocks.{layer}.{piece.ours}"
            yield replace(piece, ours=ours, theirs=f"model.layers.{layer}.{piece.theirs}")
    yield from _present(LAST_ROWS, config, _features(config), sizes)


def _present(rows: tuple[Row, ...], config: ModelConfig, features: set[str], sizes: dict[str, int]) -> Iterator[Piece]:
    for row in rows:
        has = not row.needs or row.needs in features
        if (row.where and row.where not in features) or not (has or (row.zeros is not None and row.zeros(config))):
            continue
        shape = tuple(sizes[letter] for letter in row.shape)
        yield Piece(row.ours if has else None, row.theirs, shape, row.part, row.idle)


def _features(config: ModelConfig, layer: int | None = None) -> set[str]:
    """What rows may need, of the model or of one layer."""
    routed = layer in config.routed_layers
    found = {
        "untied": not config.tie_embeddings,
        "qkv_bias": config.qkv_bias,
        "o_bias": config.o_bias,
        "qk_norm": config.qk_norm,
        "routed": routed,
        "dense": not routed,
        "shared": routed and config.shared_size > 0,
    }
    return {name for name, there in found.items() if there}


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "D": config.dim,
        "Q": config.num_heads * config.head_size,
        "G": config.kv_heads * config.head_size,
        "C": config.head_size,
        "F": config.ffn_size,
        "E": config.moe.num_experts if config.moe is not None else 0,
        "X": config.expert_size,
        "S": config.shared_size,
        "1": 1,
    }

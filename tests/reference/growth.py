"""Widening and deepening of a decoder's weights, written for reading: loops over layers, rows and columns.

FPI (Net2Net, arXiv 1511.05641; bert2BERT, arXiv 2110.07143): y = W x with W [out, in]; new outputs are copies of old
ones, and what reads copies divides by how many there are. AKI takes the new outputs from the next layer. AKI-Pro
(AquilaMoE, arXiv 2408.06567) keeps key-value heads, adds heads inside their groups, and deepens by interpolation.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from modules.config import ModelConfig

Weights = dict[str, Tensor]
Names = list[int]
"""For each index of a wider axis, the old index that it is a copy of."""

# What a parameter's rows and columns are, by its name inside a block.
RESIDUAL, HEADS, KV, HIDDEN, NOTHING = "residual", "heads", "kv", "hidden", "nothing"
SIDES = {
    "attention.q_proj.weight": (HEADS, RESIDUAL),
    "attention.k_proj.weight": (KV, RESIDUAL),
    "attention.v_proj.weight": (KV, RESIDUAL),
    "attention.o_proj.weight": (RESIDUAL, HEADS),
    "feed_forward.gate.weight": (HIDDEN, RESIDUAL),
    "feed_forward.up.weight": (HIDDEN, RESIDUAL),
    "feed_forward.down.weight": (RESIDUAL, HIDDEN),
    "feed_forward.router.weight": (NOTHING, RESIDUAL),
    "feed_forward.experts.gate": (HIDDEN, RESIDUAL),
    "feed_forward.experts.up": (HIDDEN, RESIDUAL),
    "feed_forward.experts.down": (RESIDUAL, HIDDEN),
    "attention.q_proj.bias": (HEADS, None),
    "attention.k_proj.bias": (KV, None),
    "attention.v_proj.bias": (KV, None),
    "attention.o_proj.bias": (RESIDUAL, None),
    "attention_norm.weight": (RESIDUAL, None),
    "feed_forward_norm.weight": (RESIDUAL, None),
}


def cyclic(before: int, after: int) -> Names:
    """g(i) = i mod n."""
    return [i % before for i in range(after)]


def head_map(small: ModelConfig, large: ModelConfig) -> Names:
    """AKI-Pro's h[j] = (j // a2) a + (j mod a2) mod a, with a and a2 heads in a group; groups are the same."""
    assert small.kv_heads == large.kv_heads
    a, a2 = small.num_heads // small.kv_heads, large.num_heads // large.kv_heads
    return [(j // a2) * a + (j % a2) % a for j in range(large.num_heads)]


def is_new_head(small: ModelConfig, large: ModelConfig) -> list[bool]:
    """Heads behind the old ones of their group."""
    a, a2 = small.num_heads // small.kv_heads, large.num_heads // large.kv_heads
    return [j % a2 >= a for j in range(large.num_heads)]


def axes(small: ModelConfig, large: ModelConfig) -> dict[str, tuple[Names, list[bool]]]:
    """Of each kind of axis the copies' sources, and which indices are new."""
    size = small.head_size
    heads, new_heads = head_map(small, large), is_new_head(small, large)
    hidden_before, hidden_after = small.expert_size, large.expert_size
    assert (hidden_before, hidden_after) == (small.ffn_size, large.ffn_size)
    return {
        RESIDUAL: (cyclic(small.dim, large.dim), [i >= small.dim for i in range(large.dim)]),
        HEADS: ([h * size + c for h in heads for c in range(size)], [new for new in new_heads for _ in range(size)]),
        KV: (list(range(small.kv_heads * size)), [False] * (small.kv_heads * size)),
        HIDDEN: (cyclic(hidden_before, hidden_after), [i >= hidden_before for i in range(hidden_after)]),
    }


def expand(weight: Tensor, rows: Names, columns: Names | None) -> Tensor:
    """Copy outputs; divide inputs by the number of their copies."""
    if columns is None:
        return torch.stack([weight[j] for j in rows])
    old = weight.tolist()
    shared = [columns.count(column) for column in columns]
    grown = [[old[row][column] / n for column, n in zip(columns, shared, strict=True)] for row in rows]
    return torch.tensor(grown, dtype=weight.dtype)


def fpi(weights: Weights, small: ModelConfig, large: ModelConfig) -> Weights:
    """Function-preserving initialisation (for ratios that RMSNorm does not notice)."""
    maps = axes(small, large)
    stream, everything = maps[RESIDUAL][0], list(range(small.vocab_size))
    grown: Weights = {}
    for name, weight in weights.items():
        if name == "embedding.weight":
            grown[name] = torch.stack([weight[:, source] for source in stream], dim=1)
        elif name == "head.weight":
            grown[name] = expand(weight, everything, stream)
        elif name == "final_norm.weight":
            shared = [stream.count(source) if small.tie_embeddings else 1 for source in stream]
            grown[name] = torch.stack([weight[source] / n for source, n in zip(stream, shared, strict=True)])
        else:
            grown[name] = _per_expert(name, weight, lambda one, part: _expand_part(one, part, maps))
    return grown


def aki(
    weights: Weights, small: ModelConfig, large: ModelConfig, scope: str = "all", consumers: str = "self"
) -> Weights:
    """Advanced knowledge initialisation: new rows come from the next layer's expanded matrix.

    Args:
        scope: all, or ffn_heads, which leaves rows of the residual stream (and the norms') to FPI.
        consumers: next: the columns that read new neurons and heads come from the next layer as well.
    """
    maps, grown = axes(small, large), fpi(weights, small, large)
    mixed = dict(grown)
    for name, weight in grown.items():
        following = next_layer(name, small)
        if following is None or "norm" in name:
            continue
        rows, columns = SIDES[name.split(".", 2)[2]]
        if rows != NOTHING and (scope == "all" or rows in (HEADS, HIDDEN)):
            weight = _replace_rows(name, weight, grown[following], maps[rows][1])
        if consumers == "next" and columns in (HEADS, HIDDEN):
            weight = _replace_columns(name, weight, grown[following], maps[columns][1])
        mixed[name] = weight
    return mixed


def next_layer(name: str, config: ModelConfig) -> str | None:
    """The same parameter one layer on; for feed-forwards, in the next layer of the same kind."""
    if not name.startswith("blocks."):
        return None
    _, number, part = name.split(".", 2)
    for layer in range(int(number) + 1, config.num_layers):
        same_kind = (layer in config.routed_layers) == (int(number) in config.routed_layers)
        if same_kind or not part.startswith("feed_forward."):
            return f"blocks.{layer}.{part}"
    return None


def interpolate(weights: Weights, before: int, after: int) -> Weights:
    """Layer l of the deeper model is layer floor(l before / after)."""
    grown = {name: weight for name, weight in weights.items() if not name.startswith("blocks.")}
    for layer in range(after):
        prefix = f"blocks.{layer * before // after}."
        for name, weight in weights.items():
            if name.startswith(prefix):
                grown[f"blocks.{layer}.{name.removeprefix(prefix)}"] = weight
    return grown


def aki_pro(weights: Weights, small: ModelConfig, large: ModelConfig) -> Weights:
    """AquilaMoE's scale-up: AKI in width, then interpolation in depth."""
    return interpolate(aki(weights, small, large), small.num_layers, large.num_layers)


def _expand_part(weight: Tensor, part: str, maps: dict[str, tuple[Names, list[bool]]]) -> Tensor:
    rows, columns = SIDES[part]
    sources = list(range(len(weight))) if rows == NOTHING else maps[rows][0]
    return expand(weight, sources, None if columns is None else maps[columns][0])


def _per_expert(name: str, weight: Tensor, change: Callable[[Tensor, str], Tensor]) -> Tensor:
    """Change a matrix [out, in]; experts hold theirs transposed, one behind another."""
    part = name.split(".", 2)[2]
    if ".experts." not in name:
        return change(weight, part)
    return torch.stack([change(one.T, part).T for one in weight])


def _replace_rows(name: str, weight: Tensor, other: Tensor, new: list[bool]) -> Tensor:
    if ".experts." in name:
        pairs = zip(weight, other, strict=True)
        return torch.stack([_replace_rows("", one.T, its.T, new).T for one, its in pairs])
    return torch.stack([other[j] if new[j] else weight[j] for j in range(len(weight))])


def _replace_columns(name: str, weight: Tensor, other: Tensor, new: list[bool]) -> Tensor:
    if ".experts." in name:
        pairs = zip(weight, other, strict=True)
        return torch.stack([_replace_columns("", one.T, its.T, new).T for one, its in pairs])
    return torch.stack([other[:, i] if new[i] else weight[:, i] for i in range(weight.shape[1])], dim=1)

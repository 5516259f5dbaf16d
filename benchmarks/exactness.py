"""What growth keeps of the function that a model computes: the largest change of a logit, in float64, as Markdown.

    python -m benchmarks.exactness

The models have random weights, biases and gains, and embeddings of their own or tied to the head. Rows under "not
offered" are published methods that do not keep it: the transition is rewritten by hand.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from modules.config import ModelConfig
from modules.growth.stage import GrowthStage, GrowthTarget
from modules.growth.transition import build_transition, materialize, network_source
from modules.layers.transformer import Transformer
from modules.moe_config import MoEConfig, RouterConfig

DENSE = ModelConfig(
    vocab_size=50,
    dim=32,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    ffn_dim=48,
    max_seq_len=32,
    qkv_bias=True,
)
MIXTURE = replace(DENSE, moe=MoEConfig(4, 2, num_shared_experts=1, shared_gate=True))
SIGMOIDS = replace(DENSE, moe=MoEConfig(4, 2, renormalize=False, router=RouterConfig(score="sigmoid")))
ALL_WIDTHS = GrowthTarget(dim=40, num_heads=15, num_kv_heads=5, ffn_dim=64)

Edit = Callable[[Transformer, Transformer], None]


@dataclass(frozen=True)
class Row:
    """One operation: what grows, by which options, and what is then rewritten by hand (source, grown)."""

    name: str
    target: GrowthTarget
    options: dict[str, Any] = field(default_factory=dict)
    source: ModelConfig = DENSE
    edit: Edit | None = None


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| operation | exact by its own claim | largest change of a logit, untied / tied |")
    print("|---|---|---|")
    for row in ROWS:
        claims, changes = zip(*(measure(row, tied) for tied in (False, True)), strict=True)
        assert claims[0] == claims[1], "what is tied decides nothing"
        claim = "not offered" if row.edit else "yes" if claims[0] else "no"
        print(f"| {row.name} | {claim} | {' / '.join(_short(change) for change in changes)} |")


@torch.no_grad()
def measure(row: Row, tied: bool) -> tuple[bool, float]:
    """What the transition claims, and the largest change of a logit on random tokens."""
    torch.manual_seed(0)
    old = drawn(replace(row.source, tie_embeddings=tied))
    transition = build_transition(network_source(old, {}, {}), GrowthStage(row.target, at_step=1, **row.options))
    new = materialize(transition.grown, "cpu")
    if row.edit is not None:
        row.edit(old, new)
    tokens = torch.randint(old.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(1))
    before, after = (network.logits(network(tokens, decoding=True)[0]) for network in (old, new))
    return transition.is_exact, (before - after).abs().max().item()


def drawn(config: ModelConfig) -> Transformer:
    """A model of random weights, whose logits are about as large as a trained model's."""
    network = Transformer(config).double()
    for parameter in network.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.ndim == 1 else 0.0))
    return network


def tile_heads(old: Transformer, new: Transformer) -> None:
    """New query heads are copies over the whole list, and so leave their key-value head."""
    size = old.config.head_size
    order = torch.arange(new.config.num_heads * size) % (old.config.num_heads * size)
    for before, after in zip(old.blocks, new.blocks, strict=True):
        after.attention.q_proj.weight.copy_(before.attention.q_proj.weight[order])
        after.attention.q_proj.bias.copy_(before.attention.q_proj.bias[order])
        counts = torch.bincount(order)[order]
        after.attention.o_proj.weight.copy_(before.attention.o_proj.weight[:, order] / counts)


def cube_root(old: Transformer, new: Transformer) -> None:
    """The root of third order on gate, up and down, in place of the square root on up and down."""
    alpha = _ratio(new.blocks[0].feed_forward.experts.up[0, :, 0], old.blocks[0].feed_forward.up.weight[0]) ** 2
    for layer in new.routed_layers():
        layer.experts.gate.mul_(alpha ** (1 / 3))
        for matrix in (layer.experts.up, layer.experts.down):
            matrix.mul_(alpha ** (1 / 3 - 1 / 2))


def _ratio(large: Tensor, small: Tensor) -> float:
    return (large / small).mean().item()


def _short(change: float) -> str:
    return "0" if change == 0 else f"{change:.0e}" if change < 1e-3 else f"{change:.2g}"


def _duplicated(source: ModelConfig) -> GrowthTarget:
    assert source.moe is not None
    return GrowthTarget(moe=replace(source.moe, num_experts=3 * source.moe.num_experts, top_k=3 * source.moe.top_k))


WIDER, COPY = GrowthTarget(dim=40), {"upcycle": "copy", "router_std": 0.5}
SHARED = MoEConfig(8, 4, expert_dim=16, num_shared_experts=1, shared_gate=True)
SOFTMAX_FIRST = MoEConfig(8, 2, renormalize=False)

ROWS = [
    Row("hidden × 2, `fpi`", GrowthTarget(dim=64), {"width": "fpi"}),
    Row("hidden × 2, `fpi`, copies random", GrowthTarget(dim=64), {"width": "fpi", "copies": "random"}),
    Row("hidden × 5/4, `fpi` (AquilaMoE's ratio)", WIDER, {"width": "fpi"}),
    *(
        Row(f"hidden × 5/4, `iso`, copies {kind}", WIDER, {"copies": kind.split()[-1]})
        for kind in ("even", "random", "in powers")
    ),
    Row("hidden × 5/4, `zero`", WIDER, {"width": "zero"}),
    Row("hidden × 5/4, `lemon`", WIDER, {"width": "lemon"}),
    *(
        Row(f"hidden × 5/4, `iso`, noise by {noise}", WIDER, {"split_noise": 0.3, "noise": noise})
        for noise in ("projection", "pairs")
    ),
    Row("feed-forward × 4/3", GrowthTarget(ffn_dim=64)),
    Row("query heads 8 → 12 inside 4 groups", GrowthTarget(num_heads=12)),
    Row("query heads 8 → 12 in tiled order", GrowthTarget(num_heads=12), edit=tile_heads),
    Row("whole groups 4 → 5", GrowthTarget(num_heads=10, num_kv_heads=5)),
    Row("GQA to MHA: 4 → 8 key-value heads", GrowthTarget(num_kv_heads=8)),
    Row("all widths, `iso`", ALL_WIDTHS),
    *(
        Row(f"all widths, `iso`, {name}", ALL_WIDTHS, source=replace(DENSE, norm_structure=name))
        for name in ("hybridnorm", "postnorm")
    ),
    *(
        Row(
            f"all widths, `iso`, norm of {what}",
            ALL_WIDTHS,
            source=replace(DENSE, qk_norm=True, qk_norm_scope=scope),
        )
        for scope, what in (("head", "each head's queries and keys"), ("projection", "all heads together"))
    ),
    Row("all widths of a mixture with a shared expert, `iso`", ALL_WIDTHS, source=MIXTURE),
    Row("new blocks, `zero_block`", GrowthTarget(num_layers=6)),
    Row("new blocks, `stack`", GrowthTarget(num_layers=6), {"depth": "stack"}),
    Row("new blocks, `interpolate`", GrowthTarget(num_layers=6), {"depth": "interpolate"}),
    Row("hidden × 2, `aki`", GrowthTarget(dim=64), {"width": "aki"}),
    Row(
        "AKI-Pro: heads, feed-forward and hidden × 5/4, `interpolate`",
        GrowthTarget(dim=40, num_heads=12, ffn_dim=64, num_layers=6),
        {"preset": "aki_pro"},
    ),
    Row("8 copies, top-2 renormalised", GrowthTarget(moe=MoEConfig(8, 2)), COPY),
    Row("8 shards of half the width, top-4 renormalised", GrowthTarget(moe=MoEConfig(8, 4, 24)), COPY),
    Row("the same, by the cube root", GrowthTarget(moe=MoEConfig(8, 4, 24)), COPY, edit=cube_root),
    Row("shards and a shared expert with a gate", GrowthTarget(moe=SHARED), COPY),
    Row("8 copies, softmax then top-2", GrowthTarget(moe=SOFTMAX_FIRST), COPY),
    Row("the same, with a router of zeros", GrowthTarget(moe=SOFTMAX_FIRST), COPY | {"router_std": 0.0}),
    Row("a split into 6 shards, all taken", GrowthTarget(moe=MoEConfig(6, 6, 8)), COPY),
    Row("a split into 6 shards, 3 taken", GrowthTarget(moe=MoEConfig(6, 3, 8)), COPY),
    Row("8 copies with half of the neurons redrawn (`drop`)", GrowthTarget(moe=MoEConfig(8, 2)), {"upcycle": "drop"}),
    Row("8 copies with noise", GrowthTarget(moe=MoEConfig(8, 2)), {"upcycle": "noise"}),
    Row("every expert of a mixture 3 times, top-2 → top-6", _duplicated(MIXTURE), COPY, MIXTURE),
    Row("the same, by sigmoids that are not renormalised", _duplicated(SIGMOIDS), COPY, SIGMOIDS),
]


if __name__ == "__main__":
    main()

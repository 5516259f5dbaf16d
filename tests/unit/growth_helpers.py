"""What the tests of growth share: small models in float64, stages, and how far two models' logits are apart."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from modules.config import ModelConfig
from modules.functional.losses import linear_cross_entropy
from modules.growth.operation import ParameterSource
from modules.growth.stage import GrowthStage, GrowthTarget
from modules.growth.transition import (
    Transition,
    build_transition,
    grown_factors,
    grown_state,
    materialize,
    network_source,
)
from modules.layers.transformer import Transformer
from modules.moe_config import MoEConfig, RouterConfig
from modules.optim import OptimizerConfig, build_optimizer
from tests.conftest import TOLERANCE
from tests.unit.test_layers import randomize

EXACT = TOLERANCE[torch.float64]

ROUTED: dict[str, MoEConfig | None] = {
    "none": None,
    "plain": MoEConfig(3, 2),
    "shared": MoEConfig(
        4,
        2,
        num_shared_experts=2,
        shared_gate=True,
        router=RouterConfig(score="sigmoid", bias_update_rate=0.01, gate_scale=2.5),
    ),
}


def make(config: ModelConfig, std: float = 0.3) -> Transformer:
    network = randomize(Transformer(config), torch.float64, std)
    for layer in network.routed_layers():
        if layer.router.selection_bias_E is not None:
            layer.router.selection_bias_E.normal_(std=0.1)
    return network


def stage(target: GrowthTarget, **options: object) -> GrowthStage:
    return GrowthStage(target, at_step=1, **options)


def transition_of(network: Transformer, to: GrowthStage) -> Transition:
    return build_transition(network_source(network, {}, {}), to)


def grow(network: Transformer, to: GrowthStage) -> Transformer:
    return materialize(transition_of(network, to).grown, "cpu")


@torch.no_grad()
def logits(network: Transformer, tokens: Tensor) -> Tensor:
    return network.logits(network(tokens, decoding=True)[0])


def drift(old: Transformer, new: Transformer) -> float:
    """The largest change of a logit, as a share of the largest one (or of 1)."""
    tokens = torch.randint(old.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    before = logits(old, tokens)
    return ((before - logits(new, tokens)).abs().max() / before.abs().max().clamp_min(1.0)).item()


def loss_of(network: Transformer, tokens: Tensor) -> Tensor:
    hidden, _ = network(tokens[:, :-1])
    total, _ = linear_cross_entropy(hidden.flatten(0, 1), network.head_weight, tokens[:, 1:].flatten())
    return total / tokens[:, 1:].numel()


def gradients_of(network: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    loss_of(network, tokens).backward()
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in network.named_parameters()}


def train_step(network: Transformer, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    optimizer.zero_grad()
    loss_of(network, tokens).backward()
    optimizer.step()


def state_of(network: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {name: copy.deepcopy(optimizer.state[p]) for name, p in network.named_parameters()}


def optimizer_of(grown: ParameterSource, network: Transformer, settings: OptimizerConfig) -> torch.optim.Optimizer:
    """An optimizer with the factors and the state that come out of a transition."""
    optimizer = build_optimizer(network, settings, grown_factors(grown, network))
    carried = grown_state(grown, network)
    for name, parameter in network.named_parameters():
        if name in carried:
            optimizer.state[parameter] = carried[name]
    return optimizer


def paths_part(small: Transformer, to: GrowthStage, settings: OptimizerConfig, steps: int = 10) -> list[float]:
    """How far a grown model is from its source after each step that both train on, after five steps of the source."""
    small_optimizer = build_optimizer(small, settings, {})
    batches = torch.randint(small.config.vocab_size, (5 + steps, 2, 9))
    for tokens in batches[:5]:
        train_step(small, small_optimizer, tokens)
    grown = build_transition(network_source(small, state_of(small, small_optimizer), {}), to).grown
    large = materialize(grown, "cpu")
    optimizer = optimizer_of(grown, large, settings)
    apart = []
    for tokens in batches[5:]:
        train_step(small, small_optimizer, tokens)
        train_step(large, optimizer, tokens)
        apart.append(drift(small, large))
    return apart


model_shapes = {
    "dim": st.integers(1, 4).map(lambda n: 8 * n),
    "kv": st.integers(1, 3),
    "group": st.integers(1, 3),
    "ffn": st.integers(1, 3).map(lambda n: 8 * n),
    "layers": st.integers(1, 3),
    "tied": st.booleans(),
    "bias": st.booleans(),
    "norm": st.sampled_from([None, "head", "projection"]),
    "moe": st.sampled_from(["none", "none", "plain", "shared"]),
    "structure": st.sampled_from(["prenorm", "hybridnorm", "postnorm"]),
    "seed": st.integers(0, 50),
}

more_width = {
    "more_dim": st.integers(0, 5).map(lambda n: 8 * n),
    "more_kv": st.integers(0, 3),
    "more_group": st.integers(0, 2),
    "more_ffn": st.integers(0, 5).map(lambda n: 8 * n),
    "repeats": st.sampled_from([1, 1, 2, 3]),
}
"""`repeats` above 1 repeats each key-value head and divides its group, in place of `more_kv`."""


def config_of(shape: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(
        vocab_size=20,
        dim=shape["dim"],
        num_layers=shape["layers"],
        num_heads=shape["kv"] * shape["group"],
        num_kv_heads=shape["kv"],
        head_dim=4,
        ffn_dim=shape["ffn"],
        tie_embeddings=shape["tied"],
        qkv_bias=shape["bias"],
        o_bias=shape["bias"],
        qk_norm=shape["norm"] is not None,
        qk_norm_scope=shape["norm"] or "head",
        norm_structure=shape["structure"],
        moe=ROUTED[shape["moe"]],
    )


def target_of(shape: Mapping[str, Any]) -> GrowthTarget:
    if shape["repeats"] > 1:
        kv, group = shape["kv"] * shape["repeats"], -(-shape["group"] // shape["repeats"])
    else:
        kv, group = shape["kv"] + shape["more_kv"], shape["group"] + shape["more_group"]
    return GrowthTarget(
        dim=shape["dim"] + shape["more_dim"],
        num_heads=kv * group,
        num_kv_heads=kv,
        ffn_dim=shape["ffn"] + shape["more_ffn"],
        num_layers=shape["layers"] + shape.get("more_layers", 0),
    )


def grows(shape: Mapping[str, Any]) -> bool:
    target, config = target_of(shape), config_of(shape)
    before = (config.dim, config.num_heads, config.kv_heads, config.ffn_size, config.num_layers)
    return before != (target.dim, target.num_heads, target.num_kv_heads, target.ffn_dim, target.num_layers)

"""Routed-expert layers of this project and of its peers, with the same weights.

Letters: T tokens, D model, F hidden width of an expert, E experts, K experts per token, G groups of S tokens, C slots.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.layer_weights import (
    LayerShape,
    Weights,
    dense_names,
    hf_names,
    litgpt_names,
    load,
    our_names,
    titan_names,
)
from benchmarks.timing import installed
from modules.config import ModelConfig
from modules.layers.experts import RoutedExperts
from modules.layers.feedforward import FeedForward
from modules.moe_config import MoEConfig

BALANCE_WEIGHT, Z_WEIGHT = 0.01, 0.001
HF_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
GSHARD_GROUP, GSHARD_FACTOR = 512, 2
"""Tokens of a group, and slots over choices when the load is even."""

Run = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass
class Layer:
    """A contestant: a module, and how it turns hidden [1, T, D] into its output and, if it has one, a routing loss."""

    name: str
    module: nn.Module
    run: Run
    always_bf16: bool = False
    """its experts compute in bfloat16 whatever they are given"""


def build_layers(shape: LayerShape, weights: Weights) -> Iterator[tuple[str, Callable[[], Layer]]]:
    """Names of the contestants and how to build each; a peer that is not installed is named and left out."""
    yield "dense", partial(dense_layer, shape, weights)
    yield "growmoe", partial(our_layer, shape, weights)
    peers: dict[str, list[tuple[str, Callable[[], Layer]]]] = {
        "transformers": [
            (f"transformers_{name}", partial(hf_layer, shape, weights, name)) for name in HF_IMPLEMENTATIONS
        ],
        "litgpt": [("litgpt", partial(litgpt_layer, shape, weights))],
        "torchtitan": [("torchtitan", partial(titan_layer, shape, weights))],
    }
    for package, builders in peers.items():
        if installed(package):
            yield from builders
    yield "gshard", lambda: Layer("gshard", gshard := GShardLayer(shape, weights), gshard)


def dense_layer(shape: LayerShape, weights: Weights) -> Layer:
    """Our dense feed-forward whose width is that of K experts: the first K of them, side by side."""
    module = FeedForward(shape.dim, shape.top_k * shape.expert_dim)
    load(module, dense_names(weights, shape.top_k))
    return Layer("dense", module, lambda hidden: (module(hidden)[0], None))


def our_layer(shape: LayerShape, weights: Weights) -> Layer:
    """`RoutedExperts` with balance and z-loss, as in training."""
    moe = MoEConfig(num_experts=shape.num_experts, top_k=shape.top_k, expert_dim=shape.expert_dim)
    module = RoutedExperts(ModelConfig(vocab_size=8, dim=shape.dim, num_layers=1, num_heads=1, moe=moe))
    load(module, our_names(weights))

    def run(hidden: Tensor) -> tuple[Tensor, Tensor]:
        output, stats = module(hidden)
        return output, BALANCE_WEIGHT * stats.balance_loss + Z_WEIGHT * stats.z_loss

    return Layer("growmoe", module, run)


def hf_layer(shape: LayerShape, weights: Weights, implementation: str) -> Layer:
    """transformers' Mixtral block; its balance loss is computed outside of it, as its model does."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

    config = MixtralConfig(
        hidden_size=shape.dim,
        intermediate_size=shape.expert_dim,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = implementation
    module = MixtralSparseMoeBlock(config)
    load(module, hf_names(weights))
    logits: list[Tensor] = []
    module.gate.register_forward_hook(lambda _module, _inputs, outputs: logits.append(outputs[0]))

    def run(hidden: Tensor) -> tuple[Tensor, Any]:
        logits.clear()
        output = module(hidden)
        return output, BALANCE_WEIGHT * load_balancing_loss_func((logits[0],), shape.num_experts, shape.top_k)

    return Layer(f"transformers_{implementation}", module, run)


def litgpt_layer(shape: LayerShape, weights: Weights) -> Layer:
    """litgpt's layer; it has no routing loss."""
    from litgpt.config import Config
    from litgpt.model import LLaMAMoE

    config = Config(
        n_embd=shape.dim,
        n_head=1,
        bias=False,
        mlp_class_name="LLaMAMoE",
        intermediate_size=shape.expert_dim,
        moe_intermediate_size=shape.expert_dim,
        n_expert=shape.num_experts,
        n_expert_per_token=shape.top_k,
    )
    module = LLaMAMoE(config)
    load(module, litgpt_names(weights))
    return Layer("litgpt", module, lambda hidden: (module(hidden), None))


def titan_moe_config(shape: LayerShape) -> Any:
    """torchtitan's configuration of the layer: softmax, renormalised, as for Qwen3."""
    from torchtitan.models.common import config_utils

    return config_utils.make_moe_config(
        num_experts=shape.num_experts,
        router=config_utils.make_router_config(
            dim=shape.dim,
            num_experts=shape.num_experts,
            gate_param_init={},
            top_k=shape.top_k,
            score_func="softmax",
            route_norm=True,
        ),
        routed_experts=config_utils.make_routed_experts_config(
            dim=shape.dim,
            hidden_dim=shape.expert_dim,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            param_init={},
            comm_backend="standard",
        ),
    )


def titan_layer(shape: LayerShape, weights: Weights) -> Layer:
    """torchtitan's layer; it balances by a bias and has no routing loss."""
    module = titan_moe_config(shape).build()
    load(module, titan_names(weights))
    return Layer("torchtitan", module, lambda hidden: (module(hidden), None), always_bf16=True)


class GShardLayer(nn.Module):
    """The one-hot einsum form of GShard (arXiv 2006.16668, algorithm 1), for any K: a yardstick."""

    def __init__(self, shape: LayerShape, weights: Weights) -> None:
        super().__init__()
        self.shape = shape
        self.router = nn.Parameter(weights.router_ED.clone())
        self.gate, self.up, self.down = (
            nn.Parameter(weight.mT.contiguous()) for weight in (weights.gate_EFD, weights.up_EFD, weights.down_EDF)
        )

    def forward(self, hidden_1TD: Tensor) -> tuple[Tensor, Tensor]:
        """The output and the weighted balance loss."""
        num_experts, top_k = self.shape.num_experts, self.shape.top_k
        group = min(GSHARD_GROUP, hidden_1TD.shape[1])
        slots = GSHARD_FACTOR * top_k * group // num_experts
        hidden_GSD = hidden_1TD.reshape(-1, group, self.shape.dim)
        probabilities_GSE = (hidden_GSD.float() @ self.router.float().T).softmax(dim=-1)
        gates_GSK, ids_GSK = probabilities_GSE.topk(top_k)
        gates_GSK = gates_GSK / gates_GSK.sum(dim=-1, keepdim=True)
        chosen_GKSE = F.one_hot(ids_GSK, num_experts).transpose(1, 2)
        place_GKSE = (chosen_GKSE.flatten(1, 2).cumsum(dim=1) - 1).view_as(chosen_GKSE)
        place_GSK = (place_GKSE * chosen_GKSE).sum(dim=-1).transpose(1, 2)
        slot_GSKC = F.one_hot(place_GSK.clamp_max(slots), slots + 1)[..., :-1].to(hidden_GSD.dtype)
        chosen_GSKE = chosen_GKSE.transpose(1, 2).to(hidden_GSD.dtype)
        combine_GSEC = torch.einsum("gske,gskc->gsec", chosen_GSKE * gates_GSK[..., None].to(slot_GSKC), slot_GSKC)
        dispatch_GSEC = (combine_GSEC > 0).to(hidden_GSD.dtype)
        rows_EGCD = torch.einsum("gsec,gsd->egcd", dispatch_GSEC, hidden_GSD)
        active = F.silu(torch.einsum("egcd,edf->egcf", rows_EGCD, self.gate))
        active = active * torch.einsum("egcd,edf->egcf", rows_EGCD, self.up)
        rows_EGCD = torch.einsum("egcf,efd->egcd", active, self.down)
        output_GSD = torch.einsum("gsec,egcd->gsd", combine_GSEC.to(rows_EGCD), rows_EGCD)
        balance = num_experts * (chosen_GKSE[:, 0].float().mean(dim=1) * probabilities_GSE.mean(dim=1)).sum(-1).mean()
        return output_GSD.view(hidden_1TD.shape), BALANCE_WEIGHT * balance

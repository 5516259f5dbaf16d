"""One set of weights for all layers that are compared, their names in each library, and what the layer should give.

Letters: T tokens, D model, F hidden width of an expert, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerShape:
    """D, F, E and K."""

    dim: int
    expert_dim: int
    num_experts: int
    top_k: int

    @classmethod
    def parse(cls, text: str) -> "LayerShape":
        """From `512,1024,8,2`."""
        return cls(*(int(part) for part in text.split(",")))

    def __str__(self) -> str:
        return f"D {self.dim} F {self.expert_dim}, E {self.num_experts} k {self.top_k}"

    def flops(self, num_tokens: int) -> int:
        """Of the experts' products, forward and backward; the router's are under a percent and not counted."""
        return 18 * num_tokens * self.top_k * self.dim * self.expert_dim


@dataclass(frozen=True)
class Weights:
    """The weights of all contestants, as `nn.Linear` stores them; stacked over experts."""

    router_ED: Tensor
    gate_EFD: Tensor
    up_EFD: Tensor
    down_EDF: Tensor


def draw_weights(shape: LayerShape, device: str) -> Weights:
    """Numbers that bfloat16 can hold, so that every precision has the same ones."""

    def draw(*size: int) -> Tensor:
        return (torch.randn(size, device=device) / size[-1] ** 0.5).bfloat16().float()

    num_experts, dim, hidden = shape.num_experts, shape.dim, shape.expert_dim
    return Weights(
        draw(num_experts, dim),
        draw(num_experts, hidden, dim),
        draw(num_experts, hidden, dim),
        draw(num_experts, dim, hidden),
    )


def draw_tokens(shape: LayerShape, weights: Weights, num_tokens: int) -> Tensor:
    """Hidden states [1, T, D] whose k-th and next logits lie apart, so that no rounding sends a token elsewhere.

    Peers compute logits in the precision of the layer: of twice as many tokens, those with the clearer choice are kept.
    """
    hidden_ND = torch.randn(2 * num_tokens, shape.dim, device=weights.router_ED.device).bfloat16().float()
    if shape.top_k == shape.num_experts:
        return hidden_ND[None, :num_tokens]
    best_NK = (hidden_ND @ weights.router_ED.T).topk(shape.top_k + 1).values
    clearest_T = (best_NK[:, -2] - best_NK[:, -1]).topk(num_tokens).indices.sort().values
    return hidden_ND[clearest_T][None]


def reference_output(hidden_1TD: Tensor, weights: Weights, shape: LayerShape) -> Tensor:
    """A loop over experts, in the precision of `hidden_1TD`."""
    hidden_TD = hidden_1TD[0]
    router_ED, gate_EFD, up_EFD, down_EDF = (
        weight.to(hidden_TD.dtype) for weight in (weights.router_ED, weights.gate_EFD, weights.up_EFD, weights.down_EDF)
    )
    gates_TK, ids_TK = (hidden_TD @ router_ED.T).softmax(dim=-1).topk(shape.top_k)
    gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True)
    output_TD = torch.zeros_like(hidden_TD)
    for expert in range(shape.num_experts):
        tokens, choice = torch.where(ids_TK == expert)
        rows = hidden_TD[tokens]
        active = F.silu(rows @ gate_EFD[expert].T) * (rows @ up_EFD[expert].T)
        output_TD = output_TD.index_add(0, tokens, gates_TK[tokens, choice, None] * (active @ down_EDF[expert].T))
    return output_TD[None]


def our_names(weights: Weights) -> dict[str, Tensor]:
    """For `RoutedExperts`."""
    return {
        "router.weight": weights.router_ED,
        "experts.gate": weights.gate_EFD.mT,
        "experts.up": weights.up_EFD.mT,
        "experts.down": weights.down_EDF.mT,
    }


def dense_names(weights: Weights, top_k: int) -> dict[str, Tensor]:
    """For our `FeedForward`: the first K experts, side by side."""
    gate_FD, up_FD = (weight[:top_k].flatten(0, 1) for weight in (weights.gate_EFD, weights.up_EFD))
    down_DF = weights.down_EDF[:top_k].transpose(0, 1).flatten(1)
    return {"gate.weight": gate_FD, "up.weight": up_FD, "down.weight": down_DF}


def hf_names(weights: Weights) -> dict[str, Tensor]:
    """For transformers' `MixtralSparseMoeBlock`."""
    return {
        "gate.weight": weights.router_ED,
        "experts.gate_up_proj": torch.cat((weights.gate_EFD, weights.up_EFD), dim=1),
        "experts.down_proj": weights.down_EDF,
    }


def litgpt_names(weights: Weights) -> dict[str, Tensor]:
    """For litgpt's `LLaMAMoE`."""
    stacked = {"fc_1": weights.gate_EFD, "fc_2": weights.up_EFD, "proj": weights.down_EDF}
    return {"gate.weight": weights.router_ED} | {
        f"experts.{expert}.{name}.weight": weight[expert]
        for name, weight in stacked.items()
        for expert in range(len(weight))
    }


def titan_names(weights: Weights) -> dict[str, Tensor]:
    """For torchtitan's `MoE`."""
    return {
        "router.gate.weight": weights.router_ED,
        "routed_experts.inner_experts.w1_EFD": weights.gate_EFD,
        "routed_experts.inner_experts.w3_EFD": weights.up_EFD,
        "routed_experts.inner_experts.w2_EDF": weights.down_EDF,
    }


def load(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights by name, and move the module where they are; nothing but buffers may be left out."""
    module.to(next(iter(weights.values())).device)
    parameters = dict(module.named_parameters())
    assert parameters.keys() == weights.keys(), sorted(parameters.keys() ^ weights.keys())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)

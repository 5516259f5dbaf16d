"""GShard's top-2 routing in its one-hot einsum form (arXiv 2006.16668; axlearn), as docs of the design write it down.

Letters: O outer batch, G groups, S tokens per group, D model, F hidden width of an expert, E experts, C slots.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.layers.experts import RoutedExperts


@dataclass(frozen=True)
class GShardOutput:
    """What the layer makes of its input, its losses, and the share of first and second choices without a slot."""

    output_BLD: Tensor
    balance: Tensor
    z: Tensor
    dropped: tuple[float, float]


def capacity(group_size: int, factor: float, num_experts: int, rounding: int) -> int:
    """C: rounded down, at least one; rounding to fours goes up, and leaves a single slot alone."""
    slots = max(1, int(group_size * factor / num_experts))
    if rounding == 4 and slots > 1:
        slots = 4 * math.ceil(slots / 4)
    return slots


def gshard_top_2(layer: RoutedExperts, hidden_BLD: Tensor, shape_OGS: tuple[int, int, int], slots: int) -> GShardOutput:
    """Tokens in groups [O, G, S], a combine and a dispatch tensor [O, G, S, E, C], and einsums between them."""
    num_experts = layer.router.weight.shape[0]
    x_OGSD = hidden_BLD.reshape(*shape_OGS, -1)
    wide = torch.float64 if x_OGSD.dtype == torch.float64 else torch.float32
    logits_OGSE = torch.einsum("ogsd,ed->ogse", x_OGSD.to(wide), layer.router.weight.to(wide))
    cap = layer.router.moe.router.soft_cap
    if cap is not None:
        logits_OGSE = cap * torch.tanh(logits_OGSE / cap)
    p_OGSE = torch.softmax(logits_OGSE, dim=-1)

    first_OGSE = F.one_hot(p_OGSE.argmax(dim=-1), num_experts)
    second_OGSE = F.one_hot((p_OGSE - 2 * first_OGSE).argmax(dim=-1), num_experts)
    gate1_OGS = (p_OGSE * first_OGSE).sum(dim=-1)
    gate2_OGS = (p_OGSE * second_OGSE).sum(dim=-1)
    total_OGS = gate1_OGS + gate2_OGS + 1e-9
    gate1_OGS, gate2_OGS = gate1_OGS / total_OGS, gate2_OGS / total_OGS

    earlier_OGSE = first_OGSE.cumsum(dim=2) - first_OGSE
    slot1_OGS = (earlier_OGSE * first_OGSE).sum(dim=-1)
    kept1_OGS = slot1_OGS < slots
    ahead_OG1E = (first_OGSE * kept1_OGS[..., None]).sum(dim=2, keepdim=True)
    earlier_OGSE = ahead_OG1E + second_OGSE.cumsum(dim=2) - second_OGSE
    slot2_OGS = (earlier_OGSE * second_OGSE).sum(dim=-1)
    kept2_OGS = slot2_OGS < slots

    slot_C = torch.arange(slots)
    place1_OGSEC = first_OGSE[..., None] * (slot1_OGS[..., None] == slot_C)[:, :, :, None]
    place2_OGSEC = second_OGSE[..., None] * (slot2_OGS[..., None] == slot_C)[:, :, :, None]
    combine_OGSEC = gate1_OGS[..., None, None] * place1_OGSEC + gate2_OGS[..., None, None] * place2_OGSEC
    dispatch_OGSEC = (place1_OGSEC + place2_OGSEC).to(x_OGSD.dtype)

    x_OEGCD = torch.einsum("ogsec,ogsd->oegcd", dispatch_OGSEC, x_OGSD)
    gate_OEGCF = torch.einsum("oegcd,edf->oegcf", x_OEGCD, layer.experts.gate)
    up_OEGCF = torch.einsum("oegcd,edf->oegcf", x_OEGCD, layer.experts.up)
    y_OEGCD = torch.einsum("oegcf,efd->oegcd", F.silu(gate_OEGCF) * up_OEGCF, layer.experts.down)
    output_OGSD = torch.einsum("ogsec,oegcd->ogsd", combine_OGSEC.to(x_OGSD.dtype), y_OEGCD)

    f_OGE = first_OGSE.to(wide).mean(dim=2)
    balance = num_experts**2 * (f_OGE * p_OGSE.mean(dim=2)).mean()
    z = torch.logsumexp(logits_OGSE, dim=-1).square().mean()
    dropped = tuple(1.0 - kept.double().mean().item() for kept in (kept1_OGS, kept2_OGS))
    return GShardOutput(output_OGSD.reshape(hidden_BLD.shape), balance, z, dropped)

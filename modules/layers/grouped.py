"""Products of rows grouped by expert, and the SwiGLU feed-forward of all experts made of them.

Letters: D model, F hidden width of an expert, E experts, R rows, sorted by expert.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from modules.layers.precision import compute_dtype

def grouped_linear(rows_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply each group of rows with its own matrix: rows sorted by group, `counts_E` rows in each."""
    if _has_kernel(rows_RD):
        return F.grouped_mm(rows_RD, weight_EDF, offs=_ends(counts_E))
    groups = rows_RD.split(counts_E.tolist())
    return torch.cat([group @ weight for group, weight in zip(groups, weight_EDF, strict=True)])


def grouped_outer(left_RD: Tensor, right_RF: Tensor, counts_E: Tensor) -> Tensor:
    """leftᵀ @ right of each group [E, D, F]; zero for a group without rows."""
    if _has_kernel(left_RD):
        return F.grouped_mm(left_RD.T, right_RF, offs=_ends(counts_E))
    counts = counts_E.tolist()
    pairs = zip(left_RD.split(counts), right_RF.split(counts), strict=True)
    return torch.stack([left.T @ right for left, right in pairs])


def row_multiple(device: torch.device, dtype: torch.dtype, rows_per_expert: int) -> int:
    """What the rows of each expert should be a multiple of.

    On CPUs oneDNN makes code for every new number of rows of a low-precision product (0.3 ms and 0.6 MB each, measured
    on AVX-512), and loads change with every step: with 16 the same few sizes come again. Few rows have few sizes.
    """
    makes_code = device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)
    return 16 if makes_code and rows_per_expert >= 64 else 1


def swiglu_experts(rows_RD: Tensor, counts_E: Tensor, gate_EDF: Tensor, up_EDF: Tensor, down_EFD: Tensor) -> Tensor:
    """down_e(silu(gate_e x_r) * up_e x_r) for each row r of each expert e, [R, D].

    Under autocast, rows and weights are cast as a linear layer's would be.
    """
    dtype = compute_dtype(rows_RD)
    rows_RD, gate_EDF, up_EDF, down_EFD = (t.to(dtype) for t in (rows_RD, gate_EDF, up_EDF, down_EFD))
    with torch.autocast(rows_RD.device.type, enabled=False):
        return _SwiGLUExperts.apply(rows_RD, counts_E, gate_EDF, up_EDF, down_EFD)


class _SwiGLUExperts(torch.autograd.Function):
    """Keeps the rows and three matrices of R x F for backward; the fourth, the activation, costs one pass to form again."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, counts_E: Tensor, gate_EDF: Tensor, up_EDF: Tensor, down_EFD: Tensor
    ) -> Tensor:
        gate_RF = grouped_linear(rows_RD, gate_EDF, counts_E)
        up_RF = grouped_linear(rows_RD, up_EDF, counts_E)
        silu_RF = F.silu(gate_RF)
        ctx.save_for_backward(rows_RD, counts_E, gate_EDF, up_EDF, down_EFD, gate_RF, up_RF, silu_RF)
        return grouped_linear(silu_RF * up_RF, down_EFD, counts_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, counts_E, gate_EDF, up_EDF, down_EFD, gate_RF, up_RF, silu_RF = ctx.saved_tensors
        slope_RD = grads[0].contiguous()
        d_down_EFD = grouped_outer(silu_RF * up_RF, slope_RD, counts_E)
        d_act_RF = grouped_linear(slope_RD, down_EFD.mT, counts_E)
        d_up_RF = silu_RF * d_act_RF
        d_gate_RF = torch.ops.aten.silu_backward(d_act_RF.mul_(up_RF), gate_RF)
        del d_act_RF
        d_rows_RD = grouped_linear(d_gate_RF, gate_EDF.mT, counts_E)
        d_rows_RD += grouped_linear(d_up_RF, up_EDF.mT, counts_E)
        d_gate_EDF = grouped_outer(rows_RD, d_gate_RF, counts_E)
        d_up_EDF = grouped_outer(rows_RD, d_up_RF, counts_E)
        return d_rows_RD, None, d_gate_EDF, d_up_EDF, d_down_EFD


def _has_kernel(rows: Tensor) -> bool:
    """True where `F.grouped_mm` knows the type; float64 goes group by group."""
    return rows.dtype != torch.float64


def _ends(counts_E: Tensor) -> Tensor:
    return counts_E.cumsum(0).to(torch.int32)

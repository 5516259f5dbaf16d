"""Products of rows grouped by expert, and the SwiGLU feed-forward of all experts made of them.

Letters: D model, F hidden width of an expert, E experts, R rows, sorted by expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.layers.precision import compute_dtype


def grouped_linear(rows_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply each group of rows with its own matrix: rows sorted by group, `counts_E` rows in each."""
    if rows_RD.dtype != torch.float64:  # which the kernel does not know
        return F.grouped_mm(rows_RD, weight_EDF, offs=counts_E.cumsum(0).to(torch.int32))
    groups = rows_RD.split(counts_E.tolist())
    return torch.cat([group @ weight for group, weight in zip(groups, weight_EDF, strict=True)])


def row_multiple(device: torch.device, dtype: torch.dtype, rows_per_expert: int) -> int:
    """What the rows of each expert should be a multiple of.

    On CPUs oneDNN makes code for every new number of rows of a low-precision product (0.3 ms and 0.6 MB each, measured
    on AVX-512), and loads change with every step: with 16 the same few sizes come again. Few rows have few sizes.
    """
    makes_code = device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)
    return 16 if makes_code and rows_per_expert >= 64 else 1


def swiglu_experts(rows_RD: Tensor, counts_E: Tensor, gate_EDF: Tensor, up_EDF: Tensor, down_EFD: Tensor) -> Tensor:
    """down_e(silu(gate_e x_r) * up_e x_r) for each row r of each expert e, [R, D].

    Under autocast, rows and weights are cast as a linear layer's would be. A backward written by hand was no faster,
    and took more memory: autograd lets go of each matrix of R x F as soon as it has been read.
    """
    dtype = compute_dtype(rows_RD)
    rows_RD, gate_EDF, up_EDF, down_EFD = (t.to(dtype) for t in (rows_RD, gate_EDF, up_EDF, down_EFD))
    with torch.autocast(rows_RD.device.type, enabled=False):
        gate_RF = grouped_linear(rows_RD, gate_EDF, counts_E)
        up_RF = grouped_linear(rows_RD, up_EDF, counts_E)
        return grouped_linear(F.silu(gate_RF) * up_RF, down_EFD, counts_E)

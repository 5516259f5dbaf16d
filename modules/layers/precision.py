"""The type that products are computed in."""

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The type in which a product with this tensor is computed: autocast's where it is on."""
    device_type = tensor.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else tensor.dtype


def to_compute(tensor: Tensor) -> Tensor:
    """Cast once what several products read; autocast would cast it for each of them."""
    return tensor.to(compute_dtype(tensor))

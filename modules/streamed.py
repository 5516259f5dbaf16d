"""A forward pass whose weights stay on the disk: each block's are read when it is its turn, and dropped behind it."""

from typing import Any

import torch
from torch import Tensor, nn

from modules.config import ModelConfig
from modules.layers.transformer import Transformer
from modules.weights import Weights


@torch.no_grad()
def streamed_logits(weights: Weights, config: ModelConfig, tokens_BL: Tensor) -> Tensor:
    """Logits [B, L, V] in float32 or wider, holding one block at a time beside embedding and head.

    Tokens are answered as in decoding, where no expert drops any, unless experts choose tokens.
    """
    with torch.device("meta"):
        network = Transformer(config).eval()
    for part, module in network.named_children():
        if isinstance(module, nn.ModuleList):
            for number, block in enumerate(module):
                block.register_forward_pre_hook(_Reader(weights, f"{part}.{number}"))
                block.register_forward_hook(_drop)
        else:
            _Reader(weights, part)(module)
    hidden_BLD, _ = network(tokens_BL, decoding=not config.looks_ahead)
    return network.logits(hidden_BLD)


class _Reader:
    """Gives a module its weights, wide enough to compute with."""

    def __init__(self, weights: Weights, part: str) -> None:
        self.weights, self.part = weights, part

    def __call__(self, module: nn.Module, *inputs: Any) -> None:
        tensors = {name: widened(self.weights.read(f"{self.part}.{name}")) for name in module.state_dict()}
        module.load_state_dict(tensors, assign=True)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is when it is wider: in which weights are grown and compared."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


def _drop(module: nn.Module, *unused: Any) -> None:
    module.to("meta")

"""The formula for activations against what autograd keeps of a forward pass on a CPU."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from app.scale.memory import cast_bytes, kept_bytes
from app.scale.workload import Workload
from app.strategies.layout import Layout
from app.strategies.parallelize import Recomputation, Wrapping, _recompute
from modules.config import ModelConfig
from modules.functional import attention
from modules.language_model import LanguageModel
from modules.layers.transformer import Block
from modules.moe_config import CapacityConfig, MoEConfig

ROWS, LENGTH = 2, 256
SHAPE = {"vocab_size": 512, "dim": 128, "num_layers": 4, "num_heads": 8, "num_kv_heads": 2, "ffn_dim": 384}
MOE = MoEConfig(num_experts=8, top_k=2, every=2)
CONFIGS = {
    "dense": ModelConfig(**SHAPE),
    "dropless": ModelConfig(**SHAPE, moe=MOE),
    "capacity": ModelConfig(**SHAPE, moe=replace(MOE, every=1, capacity=CapacityConfig(2.0))),
    "shared": ModelConfig(**SHAPE, moe=replace(MOE, expert_dim=64, top_k=4, num_shared_experts=2)),
}
CLOSE = 0.04
"""Statistics of routers and of norms are left out, and rows that fill an expert up."""


def kept(config: ModelConfig, what: Recomputation, is_mixed: bool) -> int:
    """Bytes of all memory that autograd holds on to after a training step's forward, but for parameters."""
    module = LanguageModel(config)
    module.configure_model()
    assert module.network is not None
    for block in module.network.blocks:
        assert isinstance(block, Block)
        _recompute(block, what)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    held: dict[int, Tensor] = {}

    def hold(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(config.vocab_size, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    precision = torch.autocast("cpu", torch.bfloat16) if is_mixed else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor), precision:
        module.training_step({"tokens": tokens}, 0)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in held.items() if place not in parameters)


@pytest.mark.parametrize("is_mixed", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("what", ["none", "selective", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_formula_is_what_autograd_keeps(
    name: str, what: Recomputation, is_mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCKWISE_MAX_LEN", 0)  # torch's kernel, which keeps no scores
    work = Workload(CONFIGS[name], Layout(), ROWS, LENGTH, Wrapping(what), compute_bytes=2 if is_mixed else 4)
    assert kept_bytes(work) == pytest.approx(kept(work.config, what, is_mixed), rel=CLOSE)


def test_casts_of_weights_are_kept_where_blocks_are_not_computed_again() -> None:
    work = Workload(CONFIGS["dense"], Layout(), ROWS, LENGTH)
    matrices = 4 * (128 * (2 * 128 + 2 * 32) + 3 * 128 * 384)
    assert cast_bytes(work) == 2 * matrices
    assert cast_bytes(replace(work, wrapping=Wrapping("full"))) == cast_bytes(replace(work, compute_bytes=4)) == 0

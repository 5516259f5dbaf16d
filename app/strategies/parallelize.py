"""A network shared out over processes: tensor and expert parallelism, recomputation, compilation, FSDP2, in this order.

The network's own code is that of one process. What changes are its parameters, which become DTensors; the forward of
the few modules that need their local part; and the dispatcher and the output, which are seams of the network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

from app.strategies.dispatchers import AllToAllDispatcher, ChannelDispatcher
from app.strategies.layout import Layout
from app.strategies.mesh import Meshes
from app.strategies.vocabulary import VocabularyParallelOutput, sum_gradients
from modules.layers.dispatch import Dispatcher
from modules.layers.experts import Experts, RoutedExperts
from modules.layers.feedforward import FeedForward
from modules.layers.grouped import swiglu_experts
from modules.layers.norm import RMSNorm, rms_norm
from modules.layers.transformer import Block, Transformer

Recomputation = Literal["none", "selective", "full"]
Gathers = Literal["float32", "bfloat16"]

BFLOAT16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
"""Weights are rounded before they are gathered; their gradients are added up in float32."""


@dataclass(frozen=True)
class Wrapping:
    """What is done to blocks beside sharing them out.

    Attributes:
        activation_checkpointing: none keeps all activations; full keeps the inputs of blocks alone and computes the
            rest again in the backward pass; selective computes attention again, and exchanges no rows twice.
        compile: compile attention and dense feed-forwards, each block's; experts run as they are.
        reshard_after_forward: gather a block's parameters again in the backward pass, rather than keep them.
        gathers: the type in which weights of attention, feed-forwards and experts are gathered. bfloat16 is for
            training under autocast, which rounds them to it anyway; these modules then compute in it everywhere.
    """

    activation_checkpointing: Recomputation = "none"
    compile: bool = False
    reshard_after_forward: bool = True
    gathers: Gathers = "float32"


def parallelize(network: Transformer, meshes: Meshes, wrapping: Wrapping) -> None:
    """Share a network out, in place; its parameters may be on the meta device."""
    layout = meshes.layout
    if layout.tp > 1:
        _split_channels(network, meshes.tp)
    for layer in network.routed_layers():
        _split_experts(layer, meshes)
    for block in _blocks(network):
        if wrapping.gathers == "bfloat16":
            _compute_in_bfloat16(block)
        _recompute(block, wrapping.activation_checkpointing)
        if wrapping.compile:
            _compile(block)
    _shard(network, meshes, wrapping)


def _split_channels(network: Transformer, tp: DeviceMesh) -> None:
    """Tensor parallelism (Megatron, arXiv 1909.08053): heads and channels by column, then by row; words too."""
    plan: dict[str, Any] = {}
    for number, block in enumerate(_blocks(network)):
        at = f"blocks.{number}"
        plan[f"{at}.attention"] = _same_input(4)  # beside it: rotary angles, mask, layer, cache
        plan |= {f"{at}.attention.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        plan[f"{at}.attention.o_proj"] = RowwiseParallel()
        feed_forward = block.feed_forward
        if isinstance(feed_forward, FeedForward):
            plan |= _feed_forward_plan(f"{at}.feed_forward", 1)
        elif isinstance(feed_forward, RoutedExperts) and feed_forward.shared is not None:
            plan |= _feed_forward_plan(f"{at}.feed_forward.shared", 0)
        for norm in (block.attention.q_norm, block.attention.k_norm):
            if isinstance(norm, RMSNorm):
                _replace_forward(norm, partial(_norm_of_some_heads, norm, tp=tp))
    if network.config.vocab_size % tp.size() == 0:
        plan["embedding"] = RowwiseParallel(input_layouts=Replicate())
        if network.head is not None:
            weight = distribute_tensor(network.head.weight, tp, [Shard(0)])
            network.head.weight = nn.Parameter(weight)
        network.output = VocabularyParallelOutput(tp)
    parallelize_module(network, tp, plan)


def _same_input(others: int) -> PrepareModuleInput:
    """A module's first input is the same on all processes, and so one sum gives its gradient; others are no tensors, or
    have none."""
    layouts = (Replicate(), *[None] * others)
    return PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)


def _feed_forward_plan(at: str, others: int) -> dict[str, Any]:
    return {
        at: _same_input(others),
        f"{at}.gate": ColwiseParallel(),
        f"{at}.up": ColwiseParallel(),
        f"{at}.down": RowwiseParallel(),
    }


def _norm_of_some_heads(norm: RMSNorm, hidden: Tensor, tp: DeviceMesh) -> Tensor:
    """A norm of each head where a process has some heads: the gain's gradient is the sum over all."""
    return rms_norm(hidden, sum_gradients(norm.weight, tp), norm.eps)


def _split_experts(layer: RoutedExperts, meshes: Meshes) -> None:
    """Experts to processes (`ep`), and the channels of each expert (`tp`)."""
    layout = meshes.layout
    dispatcher: Dispatcher = layer.dispatcher
    by_expert: list[Placement] = []
    if layout.ep > 1:
        dispatcher = AllToAllDispatcher(meshes.ep.get_group(), layer.router.moe.num_experts)
        by_expert = [Shard(0)]
    if layout.tp > 1:
        dispatcher = ChannelDispatcher(dispatcher, meshes.tp)
    layer.dispatcher = dispatcher
    if layout.ep == layout.tp == 1:
        return
    experts = layer.experts
    for name, channels in (("gate", 2), ("up", 2), ("down", 1)):
        placements = [*by_expert, Shard(channels)] if layout.tp > 1 else by_expert
        weight = distribute_tensor(getattr(experts, name), meshes.experts, placements)
        setattr(experts, name, nn.Parameter(weight))
    _replace_forward(experts, partial(_experts_of_this_process, experts))


def _experts_of_this_process(experts: Experts, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
    weights = (experts.gate, experts.up, experts.down)
    gate, up, down = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights)
    return swiglu_experts(rows_RD, counts_E, gate, up, down)


def _recompute(block: Block, what: Recomputation) -> None:
    """Activation checkpointing, without another module around: names of parameters stay."""
    if what != "none":
        again = block if what == "full" else block.attention
        _replace_forward(again, partial(checkpoint, again.forward, use_reentrant=False))


def _compile(block: Block) -> None:
    """A dense block as one graph; of a routed one attention alone, since rows of experts have another number each time,
    and their grouped products compile in bfloat16 only."""
    (block.attention if isinstance(block.feed_forward, RoutedExperts) else block).compile()


def _blocks(network: Transformer) -> list[Block]:
    return [block for block in network.blocks if isinstance(block, Block)]


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    object.__setattr__(module, "forward", forward)


def _compute_in_bfloat16(block: Block) -> None:
    """Also outside of the trainer's autocast, where a model is probed or evaluated."""
    for module in (block.attention, block.feed_forward):
        _replace_forward(module, partial(_under_autocast, module.forward))


def _under_autocast(forward: Callable[..., Any], hidden: Tensor, *others: Any, **named: Any) -> Any:
    with torch.autocast(hidden.device.type, torch.bfloat16):
        return forward(hidden, *others, **named)


def _shard(network: Transformer, meshes: Meshes, wrapping: Wrapping) -> None:
    """FSDP2 over blocks, over some of their modules apart, and over the rest; gradients are summed.

    Losses are divided by what all processes have together, so that sums over processes are the gradients: also where
    one has fewer tokens, and for experts, whose gradients come from other processes by the exchange of rows.
    """
    layout = meshes.layout
    for block in _blocks(network):
        for module, policy in _apart(block, layout, wrapping.gathers):
            is_split = isinstance(module, Experts) and layout.ep > 1
            fully_shard(
                module,
                mesh=meshes.expert_fsdp if is_split else meshes.fsdp,
                reshard_after_forward=wrapping.reshard_after_forward,
                mp_policy=policy,
                shard_placement_fn=partial(_placement, layout.efsdp if is_split else layout.dp_shard),
            )
    fully_shard(network, mesh=meshes.fsdp, reshard_after_forward=False)  # the loss needs the output's weight behind it
    register_fsdp_forward_method(network, "logits")
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _apart(block: Block, layout: Layout, gathers: Gathers) -> list[tuple[nn.Module, MixedPrecisionPolicy]]:
    """Modules of a block whose parameters are gathered apart from the rest, inner ones first, and the block at last:
    experts where they have processes of their own; in bfloat16 all but the gains and what decides about routes."""
    feed_forward, attention = block.feed_forward, block.attention
    routed = feed_forward if isinstance(feed_forward, RoutedExperts) else None
    exact = MixedPrecisionPolicy()
    if gathers == "float32":
        own = [routed.experts] if routed is not None and layout.ep > 1 else []
        return [(module, exact) for module in (*own, block)]
    gains = [norm for norm in (attention.q_norm, attention.k_norm) if isinstance(norm, RMSNorm)]
    products: list[nn.Module] = [attention]
    if routed is None:
        products.append(feed_forward)
    else:
        products += [routed.experts, *([] if routed.shared is None else [routed.shared])]
    return [*((norm, exact) for norm in gains), *((module, BFLOAT16) for module in products), (block, exact)]


def _placement(sharers: int, weight: nn.Parameter) -> Shard | None:
    """Experts by number; where there are too few, by the first side of their matrices that comes out even."""
    if weight.ndim < 3:
        return None
    sizes = (weight.to_local() if isinstance(weight, DTensor) else weight).shape
    return Shard(next((dim for dim, size in enumerate(sizes) if size % sharers == 0), 0))

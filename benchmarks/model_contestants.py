"""Whole language models of this project and of its peers, with the same weights, and one training step of each.

Every network is Llama-shaped: RMSNorm, rotary positions of half-split layout, SwiGLU, an output head of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.layer_contestants import BALANCE_WEIGHT, HF_IMPLEMENTATIONS, titan_moe_config
from benchmarks.layer_weights import LayerShape, load
from benchmarks.model_weights import hf_weights, litgpt_weights, titan_weights
from benchmarks.timing import installed
from modules.config import ModelConfig
from modules.dense import DenseLM
from modules.language_model import LanguageModel
from modules.layers.transformer import Transformer
from modules.mixture import MoELM
from modules.moe_config import MoEConfig
from modules.optim import OptimizerConfig, build_optimizer, clip_gradients

PEERS = ("transformers", "litgpt", "torchtitan")
NORM_EPS, ROPE_THETA, MAX_NORM = 1e-5, 10000.0, 1.0
OPTIMIZER = OptimizerConfig(lr=1e-5)
"""A small rate: routing, and with it the work, stays what it is at the start."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the network and of its batch; the dense one has feed-forwards of the routed one's active width."""

    layers: int
    dim: int
    ffn: int
    heads: int
    experts: int
    top_k: int
    vocab: int
    batch: int
    seq: int

    def architecture(self, routed: bool) -> ModelConfig:
        """As this project writes it; weights so large that every layer shows in the loss."""
        moe = MoEConfig(
            num_experts=self.experts, top_k=self.top_k, expert_dim=self.ffn, balance_loss_weight=BALANCE_WEIGHT
        )
        return ModelConfig(
            vocab_size=self.vocab,
            dim=self.dim,
            num_layers=self.layers,
            num_heads=self.heads,
            ffn_dim=self.top_k * self.ffn,
            max_seq_len=self.seq,
            rope_theta=ROPE_THETA,
            norm_eps=NORM_EPS,
            init_std=self.dim**-0.5,
            moe=moe if routed else None,
        )


Losses = tuple[Tensor, Tensor]
"""The loss whose gradient is taken, and the part of it that is the language model's."""


@dataclass
class Model:
    """A contestant: what has the parameters, and how tokens [B, L + 1] become losses."""

    name: str
    module: nn.Module
    losses: Callable[[Tensor], Losses]
    optimizer: torch.optim.Optimizer
    clip: Callable[[], object]
    autocast_cache: bool = True
    """whether autocast keeps its copies of weights through the forward pass; Lightning does not"""

    @property
    def routed(self) -> bool:
        """Whether it has experts."""
        return self.name.endswith(" MoE")

    def step(self, tokens: Tensor, mode: str) -> None:
        """Forward, backward, clipping, AdamW."""
        self.losses_under(tokens, mode)[0].backward()
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def losses_under(self, tokens: Tensor, mode: str) -> Losses:
        """In the precision of the mode."""
        enabled = mode == "autocast"
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=enabled, cache_enabled=self.autocast_cache):
            return self.losses(tokens)

    def held_bytes(self) -> int:
        """Parameters, buffers and the optimizer's state."""
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        tensors = [*self.module.parameters(), *self.module.buffers(), *(t for t in state if isinstance(t, Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def build_models(shape: ModelShape, device: str, compiled: bool) -> Iterator[tuple[str, Callable[[], Model]]]:
    """Names of the contestants and how to build each; a peer that is not installed is named and left out."""
    sources = {routed: Transformer(shape.architecture(routed)).to(device) for routed in (False, True)}
    for routed, source in sources.items():
        yield our_name(routed), partial(our_model, source, compiled)
    mixtral = cache(partial(hf_model, shape, sources[True]))
    peers: dict[str, list[tuple[str, Callable[[], Model]]]] = {
        "transformers": [
            ("transformers dense", partial(hf_model, shape, sources[False])),
            *((f"transformers {name} MoE", partial(hf_variant, mixtral, name)) for name in HF_IMPLEMENTATIONS),
        ],
        "litgpt": [
            ("litgpt dense", partial(litgpt_model, shape, sources[False])),
            ("litgpt MoE", partial(litgpt_model, shape, sources[True])),
        ],
        "torchtitan": [
            ("torchtitan dense", partial(titan_model, shape, sources[False])),
            ("torchtitan MoE", partial(titan_model, shape, sources[True])),
        ],
    }
    for package, builders in peers.items():
        if installed(package):
            yield from builders


def our_name(routed: bool) -> str:
    """Of this project's contestant."""
    return "growmoe MoE" if routed else "growmoe dense"


def our_model(source: Transformer, compiled: bool) -> Model:
    """The LightningModule that `growmoe fit` trains, its hooks called as Lightning's loop calls them."""
    routed = source.config.moe is not None
    lightning_module: LanguageModel = (MoELM if routed else DenseLM)(source.config, OPTIMIZER)
    network = lightning_module.network = Transformer(source.config).to(source.embedding.weight.device)
    network.load_state_dict(source.state_dict())
    if compiled:
        for block in network.blocks:
            block.compile()

    def losses(tokens: Tensor) -> Losses:
        outputs = lightning_module.training_step({"tokens": tokens}, 0)
        return outputs["loss"], outputs["lm_loss"]

    def clip() -> None:
        if not torch.isfinite(clip_gradients(network.parameters(), MAX_NORM)):
            raise FloatingPointError("gradient norm")

    optimizer = build_optimizer(network, OPTIMIZER, {})
    return Model(our_name(routed), network.train(), losses, optimizer, clip, autocast_cache=False)


def peer_model(name: str, module: nn.Module, losses: Callable[[Tensor], Losses]) -> Model:
    """A contestant with fused AdamW on all of its parameters, and clipping."""
    parameters = list(module.train().parameters())
    optimizer = torch.optim.AdamW(
        parameters, OPTIMIZER.lr, OPTIMIZER.betas, OPTIMIZER.eps, OPTIMIZER.weight_decay, fused=True
    )
    return Model(name, module, losses, optimizer, lambda: nn.utils.clip_grad_norm_(parameters, MAX_NORM))


def hf_model(shape: ModelShape, source: Transformer) -> Model:
    """transformers' Mixtral, or Mistral when dense, with its own loss; Mixtral adds its balance loss."""
    from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": shape.seq,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "use_cache": False,
        "sliding_window": None,
    }
    module: nn.Module
    routed = source.config.moe is not None
    if not routed:
        module = MistralForCausalLM(MistralConfig(**sizes, intermediate_size=shape.top_k * shape.ffn))
    else:
        moe: dict[str, Any] = {
            "num_local_experts": shape.experts,
            "num_experts_per_tok": shape.top_k,
            "intermediate_size": shape.ffn,
        }
        watched: dict[str, Any] = {"output_router_logits": True, "router_aux_loss_coef": BALANCE_WEIGHT}
        module = MixtralForCausalLM(MixtralConfig(**sizes, **moe, **watched))
    load(module, hf_weights(source))

    def losses(tokens: Tensor) -> Losses:
        inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
        outputs = module(input_ids=inputs, labels=targets, shift_labels=targets)
        balance = getattr(outputs, "aux_loss", None)
        return outputs.loss, outputs.loss.detach() - (0 if balance is None else BALANCE_WEIGHT * balance.detach())

    return peer_model("transformers MoE" if routed else "transformers dense", module, losses)


def hf_variant(mixtral: Callable[[], Model], implementation: str) -> Model:
    """Mixtral with one of its ways to compute experts; weights and optimizer are one for all of them."""
    model = mixtral()

    def losses(tokens: Tensor) -> Losses:
        model.module.set_experts_implementation(implementation)  # type: ignore[operator]
        return model.losses(tokens)

    return replace(model, name=f"transformers {implementation} MoE", losses=losses)


def litgpt_model(shape: ModelShape, source: Transformer) -> Model:
    """litgpt's GPT with the chunked cross-entropy of its pretraining."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    routed = source.config.moe is not None
    config = Config(
        block_size=shape.seq,
        n_layer=shape.layers,
        n_embd=shape.dim,
        n_head=shape.heads,
        padded_vocab_size=shape.vocab,
        vocab_size=shape.vocab,
        rotary_percentage=1.0,
        rope_base=int(ROPE_THETA),
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=NORM_EPS,
        mlp_class_name="LLaMAMoE" if routed else "LLaMAMLP",
        intermediate_size=shape.ffn if routed else shape.top_k * shape.ffn,
        moe_intermediate_size=shape.ffn if routed else None,
        n_expert=shape.experts if routed else 0,
        n_expert_per_token=shape.top_k if routed else 0,
    )
    module = GPT(config)
    load(module, litgpt_weights(source))

    def losses(tokens: Tensor) -> Losses:
        loss = chunked_cross_entropy(module(tokens[:, :-1]), tokens[:, 1:])
        return loss, loss.detach()

    return peer_model("litgpt MoE" if routed else "litgpt dense", module, losses)


def titan_model(shape: ModelShape, source: Transformer) -> Model:
    """torchtitan's Qwen3 decoder without norms of queries and keys, and with its SDPA: its flex attention has no
    backward on the CPU."""
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.models.common import CosSinRoPE, Embedding, Linear
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
    from torchtitan.models.common.nn_modules import RMSNorm
    from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock

    routed, head_dim = source.config.moe is not None, shape.dim // shape.heads
    norm = RMSNorm.Config(normalized_shape=shape.dim, eps=NORM_EPS)
    attention = make_gqa_config(
        dim=shape.dim,
        n_heads=shape.heads,
        wqkv_param_init={},
        wo_param_init={},
        inner_attention=ScaledDotProductAttention.Config(),
        rope=CosSinRoPE.Config(dim=head_dim, max_seq_len=shape.seq, theta=ROPE_THETA),
        fuse_qkv=True,
    )
    wide = shape.top_k * shape.ffn
    dense = make_ffn_config(dim=shape.dim, hidden_dim=wide, w1_param_init={}, w2w3_param_init={})
    moe = titan_moe_config(LayerShape(shape.dim, shape.ffn, shape.experts, shape.top_k))
    block = Qwen3TransformerBlock.Config(attention=attention, attention_norm=norm, ffn_norm=norm, feed_forward=dense)
    if routed:
        block = replace(block, feed_forward=None, moe=moe)
    config = Qwen3Model.Config(
        dim=shape.dim,
        vocab_size=shape.vocab,
        norm=norm,
        tok_embeddings=Embedding.Config(num_embeddings=shape.vocab, embedding_dim=shape.dim),
        lm_head=Linear.Config(in_features=shape.dim, out_features=shape.vocab),
        layers=[block] * shape.layers,
    )
    module = config.build()
    load(module, titan_weights(source))

    def losses(tokens: Tensor) -> Losses:
        targets = tokens[:, 1:].contiguous()
        loss = cross_entropy_loss(module(tokens[:, :-1]), targets) / targets.numel()
        return loss, loss.detach()

    return peer_model("torchtitan MoE" if routed else "torchtitan dense", module, losses)

"""The routed-expert layer against Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V3 and Switch of transformers.

Their routers cast logits or probabilities to float32 whatever the type of the weights. The whole layers are therefore
compared in float32; in float64, where that cast would be seen, both sides are given the choices and gates of their
router, and everything behind it is compared: shared experts, experts, and the gradients of input, gates and weights.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modules.config import ModelConfig
from modules.functional import routing
from modules.layers.experts import RoutedExperts
from modules.moe_config import CapacityConfig, MoEConfig, RouterConfig
from tests.conftest import TOLERANCE

pytest.importorskip("transformers")

DIM, HIDDEN, NUM_EXPERTS = 16, 24, 8
SIZES = {"hidden_size": DIM, "hidden_act": "silu", "experts_implementation": "eager"}


@dataclass(frozen=True)
class Twin:
    """A layer of transformers, what its configuration says beside the sizes, and the same in our configuration."""

    model: str
    config: str
    block: str
    theirs: dict[str, Any]
    ours: dict[str, Any]

    def build(self, dtype: torch.dtype, seed: int) -> tuple[nn.Module, RoutedExperts]:
        """Both layers with the same random weights."""
        torch.manual_seed(seed)
        package = f"transformers.models.{self.model}"
        config_class = getattr(importlib.import_module(package), self.config)
        config = config_class(**SIZES, num_experts_per_tok=self.ours["top_k"], **self.theirs)
        block = getattr(importlib.import_module(f"{package}.modeling_{self.model}"), self.block)(config).to(dtype)
        for tensor in block.state_dict().values():
            tensor.normal_(std=0.4)
        moe = MoEConfig(NUM_EXPERTS, expert_dim=HIDDEN, **self.ours)
        layer = RoutedExperts(ModelConfig(vocab_size=8, dim=DIM, num_heads=2, moe=moe)).to(dtype)
        layer.load_state_dict(renamed(block.state_dict()))
        return block, layer


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a layer of transformers (weights or gradients) under our names, in our layout."""
    names = {"gate.weight": "router.weight", "gate.e_score_correction_bias": "router.selection_bias_E"}
    names["shared_expert_gate.weight"] = "shared_gate.weight"
    for part in ("gate", "up", "down"):
        for shared in ("shared_expert", "shared_experts"):
            names[f"{shared}.{part}_proj.weight"] = f"shared.{part}.weight"
    tensors = dict(tensors)
    gate, up = tensors.pop("experts.gate_up_proj").chunk(2, dim=1)
    stacked = {"gate": gate, "up": up, "down": tensors.pop("experts.down_proj")}
    found = {f"experts.{name}": tensor.mT for name, tensor in stacked.items()}
    return found | {names[name]: tensor for name, tensor in tensors.items()}


def deepseek(groups: int, shared: int, normed: bool) -> Twin:
    """Half of the groups are open to a token."""
    half = (groups + 1) // 2
    theirs = {
        "n_routed_experts": NUM_EXPERTS,
        "moe_intermediate_size": HIDDEN,
        "n_shared_experts": shared,
        "n_group": groups,
        "topk_group": half,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": normed,
    }
    router = RouterConfig("top_k", "sigmoid", None, 2.5, bias_update_rate=1e-3, expert_groups=groups, top_groups=half)
    ours = {"top_k": 3, "router": router, "renormalize": normed, "num_shared_experts": shared}
    return Twin("deepseek_v3", "DeepseekV3Config", "DeepseekV3MoE", theirs, ours)


def twins() -> dict[str, Twin]:
    mixtral = ("mixtral", "MixtralConfig", "MixtralSparseMoeBlock")
    mixtral = (*mixtral, {"num_local_experts": NUM_EXPERTS, "intermediate_size": HIDDEN})
    found = {
        "mixtral": Twin(*mixtral, {"top_k": 2}),
        "mixtral-softmax-of-top-k": Twin(*mixtral, {"top_k": 3, "router": RouterConfig(score="softmax_of_top_k")}),
    }
    shared = {"num_shared_experts": 1, "shared_expert_dim": 40, "shared_gate": True}
    for normed in (True, False):
        end, ours = "" if normed else "-unnormed", {"top_k": 3, "renormalize": normed}
        theirs = {"num_experts": NUM_EXPERTS, "norm_topk_prob": normed}
        olmoe, qwen3 = theirs | {"intermediate_size": HIDDEN}, theirs | {"moe_intermediate_size": HIDDEN}
        qwen2 = qwen3 | {"shared_expert_intermediate_size": 40}
        found |= {
            f"qwen2{end}": Twin("qwen2_moe", "Qwen2MoeConfig", "Qwen2MoeSparseMoeBlock", qwen2, ours | shared),
            f"qwen3{end}": Twin("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock", qwen3, ours),
            f"olmoe{end}": Twin("olmoe", "OlmoeConfig", "OlmoeSparseMoeBlock", olmoe, ours),
            f"deepseek{end}": deepseek(groups=4, shared=2, normed=normed),
            f"deepseek-one-group{end}": deepseek(groups=1, shared=1, normed=normed),
        }
    return found


BY_TWIN = pytest.mark.parametrize("twin", twins().values(), ids=twins())
BY_SEED = pytest.mark.parametrize("seed", range(3))


def make_hidden(dtype: torch.dtype) -> Tensor:
    return torch.randn(3, 8, DIM, dtype=dtype, requires_grad=True)


def assert_close(got: Tensor, want: Tensor, name: str = "output") -> None:
    """Equal but for the type's tolerance, relative to the largest entry."""
    size = want.abs().max().item()
    assert size > 0, name
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[want.dtype] * size, msg=lambda text: f"{name}: {text}")


def assert_same(block: nn.Module, layer: RoutedExperts, hidden: Tensor, extra: dict[str, Tensor]) -> None:
    """Outputs, and the gradients of the input, of what is in `extra`, and of every parameter that has one."""
    want, (got, _) = block(hidden), layer(hidden)
    assert_close(got, want)
    probe, gradients = torch.randn_like(want), []
    for output, module in ((want, block), (got, layer)):
        sources = {"input": hidden, **extra, **dict(module.named_parameters())}
        found = torch.autograd.grad((output * probe).sum(), list(sources.values()), allow_unused=True)
        gradients.append(dict(zip(sources, found, strict=True)))
    theirs, ours = gradients
    for name in ("input", *extra):
        assert_close(ours.pop(name), theirs.pop(name), name)
    routerless = {"router.weight"} if extra else set()
    for name, gradient in renamed(theirs).items():
        assert (gradient is None) == (ours[name] is None) == (name in routerless), name
        if gradient is not None:
            assert_close(ours[name], gradient, name)


@BY_TWIN
@BY_SEED
def test_layer_is_that_of_transformers(twin: Twin, seed: int) -> None:
    block, layer = twin.build(torch.float32, seed)
    assert_same(block, layer, make_hidden(torch.float32), {})


@BY_TWIN
def test_experts_are_those_of_transformers(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    block, layer = twin.build(torch.float64, 0)
    hidden = make_hidden(torch.float64)
    logits, gates, expert_ids = block.gate(hidden.flatten(0, 1))
    assert torch.equal(gates, gates.float().to(gates.dtype))  # or the whole layer could be compared
    gates = gates.detach().double().requires_grad_()
    monkeypatch.setattr(block.gate, "forward", lambda _: (logits, gates, expert_ids))
    monkeypatch.setattr(routing, "choose_experts", lambda *_: routing.Choice(expert_ids, gates))
    assert_same(block, layer, hidden, {"gates": gates})


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen2", "qwen3", "olmoe-unnormed"])
@BY_SEED
def test_balance_loss_is_that_of_transformers(name: str, seed: int) -> None:
    """Theirs adds up the shares of the first, second, ... choices: top_k times ours. With several layers it pools them
    before it multiplies, which ours does not; with one it is the same loss."""
    twin = twins()[name]
    block, layer = twin.build(torch.float32, seed)
    hidden = make_hidden(torch.float32)
    model = importlib.import_module(f"transformers.models.{twin.model}.modeling_{twin.model}")
    logits, _, _ = block.gate(hidden.flatten(0, 1))
    want = model.load_balancing_loss_func((logits,), NUM_EXPERTS, layer.router.moe.top_k)
    got = layer.router.moe.top_k * layer(hidden)[1].balance_loss
    assert_close(got, want, "balance")
    theirs = torch.autograd.grad(want, [hidden, block.gate.weight])
    ours = torch.autograd.grad(got, [hidden, layer.router.weight])
    for kind, a, b in zip(("input", "router.weight"), ours, theirs, strict=True):
        assert_close(a, b, kind)


@pytest.mark.parametrize("kind", ["gshard", "top_k"])
def test_losses_are_those_of_switch(kind: Any) -> None:
    """Groups are sequences, and their balance loss is E²·mean(f·P) with f over first choices. Shares of eight tokens
    are exact in the float32 that they are cast to, so float64 can be compared."""
    switch = importlib.import_module("transformers.models.switch_transformers.modeling_switch_transformers")
    torch.manual_seed(0)
    moe = {
        "gshard": MoEConfig(NUM_EXPERTS, 2, router=RouterConfig(kind="gshard"), capacity=CapacityConfig(1.0)),
        "top_k": MoEConfig(NUM_EXPERTS, 1, renormalize=False, balance_level="sequence"),
    }[kind]
    layer = RoutedExperts(ModelConfig(vocab_size=8, dim=DIM, num_heads=2, moe=moe)).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    hidden = make_hidden(torch.float64)
    stats = layer(hidden)[1]
    logits = layer.router(hidden)
    balance = switch.load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))
    z = switch.router_z_loss_func(logits)
    for name, got, want in (("balance", stats.balance_loss, balance), ("z", stats.z_loss, z)):
        assert_close(got, want, name)
        gradients = [
            torch.autograd.grad(loss, [hidden, layer.router.weight], retain_graph=True) for loss in (got, want)
        ]
        for ours, theirs in zip(*gradients, strict=True):
            assert_close(ours, theirs, name)

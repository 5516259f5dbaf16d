"""Routing losses reach the total and the router; global counts and the selection bias live for an optimizer step."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from modules.config import ModelConfig
from modules.functional.schedule import Pace, ScheduleConfig, learning_rate_factor
from modules.layers.experts import RoutedExperts
from modules.layers.transformer import Transformer
from modules.mixture import MoELM
from modules.moe_config import CapacityConfig, MoEConfig, RouterConfig
from modules.optim import OptimizerConfig, build_optimizer, build_scheduler
from tests.conftest import TOLERANCE
from tests.reference import routing as loops

SMALL = MoEConfig(num_experts=4, top_k=2, expert_dim=24, balance_loss_weight=0.3, z_loss_weight=0.05)
GLOBAL = replace(SMALL, balance_level="global")
BIASED = replace(GLOBAL, router=RouterConfig(score="sigmoid", bias_update_rate=0.02))
LEVELS = {
    "micro_batch": SMALL,
    "sequence": replace(SMALL, balance_level="sequence"),
    "gshard": replace(SMALL, router=RouterConfig(kind="gshard"), capacity=CapacityConfig(1.0, group_size=4)),
}
NUM_BATCHES, MAX_STEPS = 5, 6
CLOSE = {"rtol": TOLERANCE[torch.float64], "atol": TOLERANCE[torch.float64]}


def make_module(moe: MoEConfig, kind: type[MoELM] = MoELM) -> MoELM:
    """A dense layer between two routed ones, in float64, with weights large enough to route unevenly."""
    torch.manual_seed(0)
    moe = replace(moe, layers=(0, 2))
    config = ModelConfig(vocab_size=32, dim=16, num_layers=3, num_heads=2, ffn_dim=24, init_std=0.3, moe=moe)
    module = kind(config, OptimizerConfig(lr=0.01), ScheduleConfig(warmup_steps=2))
    module.configure_model()
    return module.double()


def make_batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"tokens": torch.randint(32, (2, 7), generator=generator), "target_bytes": torch.tensor([6, 6])}


def follow(network: Transformer, tokens_BL: Tensor) -> tuple[Tensor, list[tuple[RoutedExperts, Tensor]]]:
    """The language-model loss, and each routed layer with what it was given."""
    given: list[tuple[RoutedExperts, Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: given.append((layer, args[0])))
        for layer in network.routed_layers()
    ]
    hidden_BLD, _ = network(tokens_BL[:, :-1])
    for hook in hooks:
        hook.remove()
    return F.cross_entropy(network.logits(hidden_BLD).flatten(0, 1), tokens_BL[:, 1:].flatten()), given


# -- one step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("moe", LEVELS.values(), ids=LEVELS)
def test_total_is_the_weighted_sum(moe: MoEConfig, reduction: Any) -> None:
    module, batch = make_module(replace(moe, aux_reduction=reduction)), make_batch(1)
    outputs = module.training_step(batch, 0)
    lm_loss, given = follow(module.network, batch["tokens"])
    reported = [loops.routed_experts(layer, hidden) for layer, hidden in given]
    balance = sum(layer.balance for layer in reported)
    z = sum(layer.z for layer in reported)
    share = 1.0 if reduction == "sum" else 0.5
    assert balance > 2.01 and z > 0.1
    torch.testing.assert_close(outputs["lm_loss"], lm_loss.detach(), **CLOSE)
    torch.testing.assert_close(outputs["loss"], lm_loss + share * (0.3 * balance + 0.05 * z), **CLOSE)
    torch.testing.assert_close(outputs["balance_loss"], balance.detach() / 2, **CLOSE)
    torch.testing.assert_close(outputs["z_loss"], z.detach() / 2, **CLOSE)
    assert outputs["loss"].requires_grad and not outputs["balance_loss"].requires_grad


@pytest.mark.parametrize("weights", [(0.3, 0.0), (0.0, 0.05), (0.3, 0.05)])
@pytest.mark.parametrize("moe", LEVELS.values(), ids=LEVELS)
def test_router_gradient_is_the_auxiliary_gradient(moe: MoEConfig, weights: tuple[float, float]) -> None:
    balance_weight, z_weight = weights
    batch, gradients = make_batch(1), []
    for chosen in (weights, (0.0, 0.0)):
        module = make_module(replace(moe, balance_loss_weight=chosen[0], z_loss_weight=chosen[1], aux_reduction="sum"))
        module.training_step(batch, 0)["loss"].backward()
        gradients.append({name: p.grad for name, p in module.network.named_parameters()})
    _, given = follow(module.network, batch["tokens"])
    reported = [loops.routed_experts(layer, hidden) for layer, hidden in given]
    auxiliary = sum(balance_weight * layer.balance + z_weight * layer.z for layer in reported)
    wanted = torch.autograd.grad(auxiliary, list(module.network.parameters()), materialize_grads=True)
    for (name, _), want in zip(module.network.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(gradients[0][name] - gradients[1][name], want, **CLOSE)
        if name.endswith("router.weight"):
            assert want.abs().max() > 1e-4, name


# -- whole runs --------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """One micro-batch: the optimizer steps before it, what it returned, and the selection biases while it ran."""

    step: int
    outputs: dict[str, Tensor]
    biases: list[Tensor]


class Watched(MoELM):
    """Keeps what micro-batches return, and the selection biases at the end of `optimizer.step` and after all."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[Seen] = []
        self.biases_in_step: dict[int, list[Tensor]] = {}

    def biases(self) -> list[Tensor]:
        layers = self.network.routed_layers()
        return [layer.router.selection_bias_E.clone() for layer in layers if layer.router.selection_bias_E is not None]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        outputs = super().training_step(batch, batch_idx)
        self.seen.append(Seen(self.trainer.global_step, {k: v.detach() for k, v in outputs.items()}, self.biases()))
        return outputs

    def configure_optimizers(self) -> dict[str, Any]:
        chosen = super().configure_optimizers()
        chosen["optimizer"].register_step_post_hook(self._note_biases)
        return chosen

    def _note_biases(self, *_: Any) -> None:
        """Twice a step where torch has also seen an AdamW of its own, whose `step` ours calls."""
        self.biases_in_step[self.trainer.global_step] = self.biases()


class Batches(pl.LightningDataModule):
    """Five batches an epoch, so that with two micro-batches to a step the last step of an epoch has one."""

    languages = ("en",)

    def train_dataloader(self) -> DataLoader:
        return DataLoader([make_batch(n) for n in range(NUM_BATCHES)], batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([make_batch(99)], batch_size=None)


def fit(module: MoELM, accumulate: int, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        precision="64-true",
        max_steps=MAX_STEPS,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"limit_val_batches": 0} | options),
    )
    trainer.fit(module, datamodule=Batches())
    return trainer


def plain_balance(layer: RoutedExperts, hidden_BLD: Tensor, counts: list[int]) -> Tensor:
    """E·Σ_e f_e·P_e, where the counts give f."""
    rows = [loops.router_logits(layer, row) for row in hidden_BLD.flatten(0, 1)]
    mean_E = torch.stack([loops.expert_probabilities(layer, row) for row in rows]).mean(0)
    return len(counts) * sum(count / sum(counts) * p for count, p in zip(counts, mean_E, strict=True))


def plain_training(network: Transformer, moe: MoEConfig, steps: Iterable[list[int]], accumulate: int) -> list[float]:
    """The same run without Lightning and without MoELM; returns the total of each micro-batch."""
    optimizer = build_optimizer(network, OptimizerConfig(lr=0.01), {})
    scheduler = build_scheduler(
        optimizer, lambda step: learning_rate_factor(step, Pace(MAX_STEPS), ScheduleConfig(warmup_steps=2))
    )
    losses = []
    for micro_batches in steps:
        totals = [[0] * moe.num_experts for _ in network.routed_layers()]
        for seed in micro_batches:
            loss, given = follow(network, make_batch(seed)["tokens"])
            for number, (layer, hidden) in enumerate(given):
                routed = loops.routed_experts(layer, hidden)
                totals[number] = [sum(pair) for pair in zip(totals[number], routed.tokens_per_expert, strict=True)]
                balance = plain_balance(layer, hidden, totals[number])
                loss = loss + (moe.balance_loss_weight * balance + moe.z_loss_weight * routed.z) / len(given)
            (loss / accumulate).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        for layer, counts in zip(network.routed_layers(), totals, strict=True):
            for e, count in enumerate(counts if moe.router.bias_update_rate else []):
                even = sum(counts) / len(counts)
                layer.router.selection_bias_E[e] += moe.router.bias_update_rate * ((count < even) - (count > even))
    return losses


def micro_batches_of_steps(accumulate: int) -> list[list[int]]:
    """Which batches each optimizer step sees."""
    epoch = [list(range(NUM_BATCHES))[start : start + accumulate] for start in range(0, NUM_BATCHES, accumulate)]
    return (epoch * MAX_STEPS)[:MAX_STEPS]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("moe", [GLOBAL, BIASED], ids=["global", "biased"])
def test_a_run_is_the_plain_loop(moe: MoEConfig, accumulate: int) -> None:
    """Parameters and biases after several steps; counts add up over the micro-batches of a step and begin anew."""
    module = make_module(moe, Watched)
    plain = deepcopy(module.network)
    fit(module, accumulate)
    losses = plain_training(plain, moe, micro_batches_of_steps(accumulate), accumulate)
    found = [seen.outputs["loss"].item() for seen in module.seen]
    torch.testing.assert_close(found, losses, **CLOSE)
    for (name, got), want in zip(module.network.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_global_balance_counts_the_step_so_far(accumulate: int) -> None:
    module = make_module(GLOBAL, Watched)
    used: list[Tensor] = []
    module.network.register_forward_hook(
        lambda _, args, result: used.append(torch.stack([layer.probabilities_GE[0].detach() for layer in result[1]]))
    )
    fit(module, accumulate)
    steps = [list(group) for _, group in groupby(zip(module.seen, used, strict=True), lambda pair: pair[0].step)]
    assert [len(step) for step in steps] == [len(step) for step in micro_batches_of_steps(accumulate)]
    ignoring_earlier = []
    for step in steps:
        so_far_NE = torch.zeros(2, 4)
        for seen, probabilities_NE in step:
            own_NE = seen.outputs["tokens_per_expert_NE"]
            assert own_NE.sum(1).tolist() == [24, 24]  # 12 tokens, two choices each
            so_far_NE = so_far_NE + own_NE
            wanted, alone = (
                4 * (counts_NE / counts_NE.sum(1, keepdim=True) * probabilities_NE).sum(1).mean()
                for counts_NE in (so_far_NE.double(), own_NE.double())
            )
            torch.testing.assert_close(seen.outputs["balance_loss"], wanted, **CLOSE)
            ignoring_earlier.append(torch.isclose(alone, wanted).item())
    assert all(ignoring_earlier) == (accumulate == 1)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bias_moves_once_a_step_and_after_it(accumulate: int) -> None:
    module = make_module(BIASED, Watched)
    fit(module, accumulate)
    before = [torch.zeros(4), torch.zeros(4)]
    for step, group in groupby(module.seen, lambda seen: seen.step):
        micro_batches = list(group)
        for biases in (*(seen.biases for seen in micro_batches), module.biases_in_step[step]):
            assert all(torch.equal(a, b) for a, b in zip(biases, before, strict=True))
        load_NE = sum(seen.outputs["tokens_per_expert_NE"] for seen in micro_batches).double()
        move_NE = 0.02 * torch.sign(load_NE.mean(1, keepdim=True) - load_NE)
        assert move_NE.any()
        before = [bias_E + move_E.float() for bias_E, move_E in zip(before, move_NE, strict=True)]
    assert len(module.biases_in_step) == MAX_STEPS
    assert all(torch.equal(a, b) for a, b in zip(module.biases(), before, strict=True))
    for layer, bias_E in zip((0, 2), before, strict=True):
        assert torch.equal(module.state_dict()[f"network.blocks.{layer}.feed_forward.router.selection_bias_E"], bias_E)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_validation_leaves_counts_and_bias_alone(accumulate: int) -> None:
    """It runs after every micro-batch, also between two of one step."""
    plain, validated = make_module(BIASED, Watched), make_module(BIASED, Watched)
    fit(plain, accumulate)
    trainer = fit(validated, accumulate, limit_val_batches=1, val_check_interval=1, num_sanity_val_steps=1)
    assert "val/loss" in trainer.callback_metrics
    assert [seen.outputs["loss"] for seen in plain.seen] == [seen.outputs["loss"] for seen in validated.seen]
    for got, want in zip(validated.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(got, want)
    biases = validated.biases()
    trainer.validate(validated, datamodule=Batches(), verbose=False)
    assert biases[0].any() and all(torch.equal(a, b) for a, b in zip(validated.biases(), biases, strict=True))

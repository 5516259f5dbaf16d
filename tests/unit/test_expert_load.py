"""Expert load: figures of summed counts, a capped set of keys, and shares by layer (collapse: test_expert_collapse)."""

import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks.expert_load import ExpertLoad, spread
from modules.config import ModelConfig
from modules.errors import InputError
from modules.functional.routing import RoutingStats
from modules.layers.transformer import Transformer
from modules.moe_config import CapacityConfig, MoEConfig, RouterConfig
from modules.routing_balance import watched_routing
from modules.routing_metrics import RoutingLoad

EVEN, SKEWED, COLLAPSED = [4, 4, 4, 4], [7, 6, 3, 0], [8, 8, 0, 0]
"""choices of 8 tokens for two of four experts each"""


def watched(counts: Any, **figures: Any) -> dict[str, Tensor]:
    """What a training step returns of its routers, with 8 tokens."""
    counts_NE = torch.tensor(counts)
    zeros_N = torch.zeros(len(counts_NE))
    outputs = {
        "tokens_per_expert_NE": counts_NE, "dropped_NK": torch.zeros(len(counts_NE), 2), "entropy_N": zeros_N,
        "logit_rms_N": zeros_N, "balance_loss": torch.ones(()), "z_loss": torch.zeros(()),
        "losses_BL": torch.zeros(1, 8),
    }  # fmt: skip
    return outputs | {name: torch.tensor(value) for name, value in figures.items()}


def config(num_layers: int = 1, **moe: Any) -> ModelConfig:
    """Every layer routed, four experts unless said otherwise."""
    routed = MoEConfig(**({"num_experts": 4} | moe))
    return ModelConfig(vocab_size=64, dim=16, num_layers=num_layers, num_heads=2, moe=routed)


class Run:
    """A trainer and its module as far as the callback looks at them; keeps what is logged and warned."""

    def __init__(self, run_dir: Path, callback: ExpertLoad, architecture: ModelConfig, accumulate: int = 1) -> None:
        self.callback, self.accumulate, self.micro_batches = callback, accumulate, 0
        self.logged: dict[int, dict[str, float]] = {}
        self.warned: dict[int, list[str]] = {}
        self.module: Any = SimpleNamespace(architecture=architecture, device=torch.device("cpu"), stage=0)
        loop = SimpleNamespace(_should_accumulate=lambda: self.micro_batches % self.accumulate > 0)
        self.trainer: Any = SimpleNamespace(
            default_root_dir=str(run_dir), log_every_n_steps=1, global_step=0, is_global_zero=True,
            datamodule=SimpleNamespace(consumed_samples=0, seq_len=8), fit_loop=SimpleNamespace(epoch_loop=loop),
            loggers=[SimpleNamespace(log_metrics=lambda metrics, step: self.logged.update({step: metrics}))],
        )  # fmt: skip

    def feed(self, *outputs: dict[str, Tensor]) -> None:
        """Micro-batch after micro-batch."""
        for output in outputs:
            self.micro_batches += 1
            self.trainer.datamodule.consumed_samples += 1
            self.trainer.global_step = self.micro_batches // self.accumulate
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.callback.on_train_batch_end(self.trainer, self.module, output, None, self.micro_batches)
            if caught:
                self.warned[self.trainer.global_step] = [str(warning.message) for warning in caught]

    def grow(self, architecture: ModelConfig) -> None:
        """A transition to another network."""
        self.module.architecture, self.module.stage = architecture, self.module.stage + 1
        self.callback.on_transition(self.trainer, self.module, {})

    @property
    def shares(self) -> list[dict[str, Any]]:
        """The lines of expert_load.jsonl."""
        path = Path(self.trainer.default_root_dir) / "expert_load.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# -- the metric --------------------------------------------------------------------------------------------------------


def test_figures_are_those_worked_out_by_hand() -> None:
    metric = RoutingLoad(num_layers=2, num_experts=4, top_k=2)
    figures = {"entropy_N": [1.0, 0.5], "logit_rms_N": [3.0, 4.0], "dropped_NK": [[0.25, 0.5], [0.0, 1.0]]}
    metric.update(watched([EVEN, COLLAPSED], **figures, balance_loss=1.5, z_loss=0.25), 8)
    found = {name: value.tolist() for name, value in metric.compute().items()}
    assert found == {
        "load_cv_N": [0.0, 1.0], "load_cv": 0.5,  # loads of the second layer: 2, 2, 0, 0
        "max_over_ideal_N": [1.0, 2.0], "max_over_ideal": 2.0,
        "dead_fraction_N": [0.0, 0.5], "dead_fraction": 0.25,
        "entropy_N": [1.0, 0.5], "entropy": 0.75,
        "logit_rms_N": [3.0, 4.0], "logit_rms": math.sqrt(12.5),
        "dropped_first_N": [0.25, 0.0], "dropped_first": 0.125,
        "dropped_second_N": [0.5, 1.0], "dropped_second": 0.75,
        "balance_loss": 1.5, "z_loss": 0.25, "tokens_per_expert_NE": [EVEN, COLLAPSED],
    }  # fmt: skip


def test_a_step_is_all_of_its_micro_batches() -> None:
    """Loads that lean to opposite sides are even together; means are weighted by tokens."""
    metric = RoutingLoad(1, 4, 2)
    metric.update(watched([[8, 8, 0, 0]], entropy_N=[0.3], logit_rms_N=[1.0], dropped_NK=[[0.4, 0.8]], z_loss=1.0), 8)
    small = {"entropy_N": [0.6], "logit_rms_N": [2.0], "dropped_NK": [[0.1, 0.2]], "z_loss": 4.0}
    metric.update(watched([[0, 0, 4, 4]], **small), 4)
    figures = metric.compute()
    assert figures["tokens_per_expert_NE"].tolist() == [[8, 8, 4, 4]]
    assert figures["load_cv"].item() == pytest.approx(1 / 3)  # means of the two would be 1
    assert figures["dead_fraction"].item() == 0 and figures["max_over_ideal"].item() == pytest.approx(4 / 3)
    assert figures["entropy"].item() == pytest.approx(0.4) and figures["z_loss"].item() == pytest.approx(2.0)
    assert figures["logit_rms"].item() == pytest.approx(math.sqrt(2.0))
    assert [figures[f"dropped_{which}"].item() for which in ("first", "second")] == pytest.approx([0.3, 0.6])
    metric.reset()
    metric.update(watched([EVEN]), 8)
    assert metric.compute()["tokens_per_expert_NE"].tolist() == [EVEN]


def routed(network: Transformer, tokens_BL: Tensor) -> dict[str, Tensor]:
    """What real routers report, as a training step returns it."""
    stats: list[RoutingStats]
    with torch.no_grad():
        _, stats = network(tokens_BL)
    losses = {"balance_loss": torch.stack([layer.balance_loss for layer in stats]).mean()}
    return watched_routing(stats) | losses | {"z_loss": torch.stack([layer.z_loss for layer in stats]).mean()}


def test_parts_of_a_batch_add_up_to_the_whole_for_real_routers() -> None:
    moe = MoEConfig(num_experts=4, router=RouterConfig(kind="gshard"), capacity=CapacityConfig(factor=0.75))
    torch.manual_seed(0)
    network = Transformer(ModelConfig(dim=16, num_layers=3, num_heads=2, vocab_size=64, moe=moe)).double()
    tokens_BL = torch.randint(64, (6, 16))
    whole, parts, other = (RoutingLoad(3, 4, 2) for _ in range(3))
    whole.update(routed(network, tokens_BL), tokens_BL.numel())
    for metric, rows in ((parts, [0]), (parts, [1, 2]), (other, [3, 4]), (other, [5])):
        metric.update(routed(network, tokens_BL[rows]), 16 * len(rows))
    parts.merge_state(other)  # torchmetrics' own way to put two ranks together
    want, got = whole.compute(), parts.compute()
    assert want.keys() == got.keys() and want["dropped_second"] > want["dropped_first"] > 0
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10, msg=name)
    assert int(got["tokens_per_expert_NE"].sum()) == 3 * 6 * 16 * 2


# -- what is logged ----------------------------------------------------------------------------------------------------

ALL = ["balance_loss", "dead_fraction", "entropy", "load_cv", "logit_rms", "max_over_ideal", "z_loss"]


@pytest.mark.parametrize(
    ("num_layers", "per_layer_keys", "layers"),
    [(1, 8, ["00"]), (3, 8, ["00", "01", "02"]), (12, 4, ["00", "04", "07", "11"]), (12, 1, ["00"]), (12, 0, [])],
)
def test_keys_are_capped(tmp_path: Path, num_layers: int, per_layer_keys: int, layers: list[str]) -> None:
    run = Run(tmp_path, ExpertLoad(per_layer_keys=per_layer_keys), config(num_layers))
    run.feed(watched([SKEWED] * num_layers))
    by_layer = [f"layer_{n}/{name}" for n in layers for name in ("dead_fraction", "load_cv", "max_over_ideal")]
    assert sorted(run.logged[1]) == [f"moe/{name}" for name in sorted([*ALL, *by_layer])]
    assert run.callback.latest_metrics == run.logged[1]
    assert len(run.shares[0]["layers"]) == num_layers


def test_layers_are_named_by_their_place_in_the_network(tmp_path: Path) -> None:
    run = Run(tmp_path, ExpertLoad(), config(num_layers=6, every=3))
    run.feed(watched([EVEN, COLLAPSED]))
    assert run.logged[1]["moe/layer_02/load_cv"] == 0 and run.logged[1]["moe/layer_05/load_cv"] == 1
    assert list(run.shares[0]["layers"]) == ["2", "5"]


@pytest.mark.parametrize(
    ("moe", "dropped"),
    [
        ({}, []),
        ({"capacity": CapacityConfig()}, ["first", "second"]),
        ({"capacity": CapacityConfig(), "top_k": 1}, ["first"]),
        ({"capacity": CapacityConfig(), "top_k": 3}, ["first", "second"]),
        (
            {"capacity": CapacityConfig(), "router": RouterConfig(kind="expert_choice"), "renormalize": False,
             "balance_loss_weight": 0.0},
            ["first"],
        ),
    ],
)  # fmt: skip
def test_dropped_choices_are_logged_where_there_is_a_capacity(
    tmp_path: Path, moe: dict[str, Any], dropped: list[str]
) -> None:
    run = Run(tmp_path, ExpertLoad(), config(**moe))
    run.feed(watched([SKEWED], dropped_NK=[[0.125, 0.25, 0.5][: moe.get("top_k", 2)]]))
    found = {name: value for name, value in run.logged[1].items() if "dropped" in name}
    values = {"first": 0.125, "second": 0.25}
    assert found == {f"moe/dropped_{which}": values[which] for which in dropped}


def test_a_logged_step_is_that_step_alone_with_all_its_micro_batches(tmp_path: Path) -> None:
    run = Run(tmp_path, ExpertLoad(), config(), accumulate=2)
    run.trainer.log_every_n_steps = 2
    skewed, mirrored = watched([SKEWED], entropy_N=[0.5]), watched([SKEWED[::-1]], entropy_N=[1.0])
    run.feed(skewed, skewed, mirrored)
    assert not run.logged
    run.feed(skewed)
    assert list(run.logged) == [2] and run.logged[2]["moe/entropy"] == 0.75
    assert run.logged[2]["moe/load_cv"] == pytest.approx(1 / 8)  # 7 9 9 7; one micro-batch alone has 0.68
    assert run.shares == [{"step": 2, "tokens": 32, "layers": {"0": [0.2188, 0.2812, 0.2812, 0.2188]}}]


def test_only_experts_without_a_token_have_no_share(tmp_path: Path) -> None:
    run = Run(tmp_path, ExpertLoad(), config())
    run.feed(watched([[10_000_000, 5_000_000, 1, 0]]))
    assert run.shares[0]["layers"]["0"] == [0.6667, 0.3333, 6.667e-08, 0.0]


def test_other_ranks_write_nothing_and_dense_networks_have_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, ExpertLoad(), config())
    run.trainer.is_global_zero = False
    run.feed(watched([SKEWED]))
    assert run.logged and not run.shares
    dense = Run(tmp_path, ExpertLoad(), ModelConfig(vocab_size=64, dim=16, num_layers=1, num_heads=2))
    dense.feed({"losses_BL": torch.zeros(1, 8)})
    assert not dense.logged and not dense.shares


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host, each of which would wait for a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_only_logged_steps_wait_for_the_device(tmp_path: Path) -> None:
    run = Run(tmp_path, ExpertLoad(), config())
    run.trainer.log_every_n_steps = 3
    with HostReads() as reads:
        run.feed(watched([SKEWED]), watched([SKEWED]))
        assert reads.count == 0
        run.feed(watched([SKEWED]))
        assert reads.count > 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"per_layer_keys": -1}, "expert_load.per_layer_keys=-1"),
        ({"collapse_window": -1}, "expert_load.collapse_window=-1"),
        ({"warn_dead_fraction": 1.5}, "expert_load.warn_dead_fraction=1.5"),
        ({"warn_dead_fraction": math.nan}, "expert_load.warn_dead_fraction=nan"),
        ({"warn_max_over_ideal": 0.5}, "expert_load.warn_max_over_ideal=0.5"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        ExpertLoad(**options)


def test_spread_has_both_ends() -> None:
    assert spread(5, 5) == [0, 1, 2, 3, 4] and spread(48, 3) == [0, 24, 47] and spread(2, 8) == [0, 1]
    assert spread(3, 0) == [] and spread(3, 1) == [0]

"""Collapse of experts: told once, with value, limit and remedy, and by a resumed run as by the uninterrupted one."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.expert_load import ExpertLoad
from modules.moe_config import CapacityConfig, RouterConfig
from tests.unit.test_expert_load import COLLAPSED, EVEN, SKEWED, Run, config, watched


def test_dead_experts_are_told_once_with_value_limit_and_remedy(tmp_path: Path) -> None:
    run = Run(tmp_path, ExpertLoad(collapse_window=3, warn_max_over_ideal=9.0), config(num_layers=6, every=3))
    dead, alive = [4, 4, 8, 0], [4, 4, 7, 1]
    run.feed(*(watched([EVEN, row]) for row in (alive, dead, dead)))
    assert not run.warned  # a token within the window
    run.feed(*(watched([EVEN, dead]) for _ in range(5)))
    assert list(run.warned) == [4] and len(run.warned[4]) == 1
    assert run.warned[4][0] == (
        "layer 5: 1 of 4 experts got no token in the 3 logged steps up to step 4: dead fraction 0.25, limit "
        "expert_load.warn_dead_fraction=0; raise moe.balance_loss_weight=0.01, set moe.router.bias_update_rate (0.001 "
        "is usual; now 0), lower optimizer.lr or lengthen schedule.warmup_steps"
    )


@pytest.mark.parametrize(
    ("window", "steps", "told"),
    [
        (2, "dd.ddd", [2]),  # one token does not end it
        (2, "dd..dd", [2, 6]),
        (3, "ddd.ddd.ddd.ddd", [3]),
        (3, "ddd..ddd", [3, 8]),
        (3, "hhh...hhh", [3]),  # at three steps only is the window's sum below the limit
        (3, "hhh......hhh", [3, 11]),
        (3, "hh...", [3]),
    ],
)
def test_it_is_told_again_only_after_more_than_a_window_without_it(
    tmp_path: Path, window: int, steps: str, told: list[int]
) -> None:
    rows = {"d": [4, 4, 8, 0], ".": [4, 4, 4, 4], "h": [13, 1, 1, 1]}
    run = Run(tmp_path, ExpertLoad(collapse_window=window, warn_max_over_ideal=2.1), config())
    run.feed(*(watched([rows[step]]) for step in steps))
    assert list(run.warned) == told


@pytest.mark.parametrize(
    ("num_experts", "top_k", "busiest", "limit"), [(4, 1, 2.5, 2.5), (8, 2, 2.5, 2.5), (64, 8, 4.5, 4.5)]
)
def test_uneven_load_is_told_half_way_to_a_single_expert(
    tmp_path: Path, num_experts: int, top_k: int, busiest: float, limit: float
) -> None:
    even = 1000
    for extra, told in ((0, False), (4, True)):
        first = int(busiest * even) + extra
        rest, last = divmod(num_experts * even - first, num_experts - 1)
        counts = [first, *[rest] * (num_experts - 2), rest + last]
        run = Run(tmp_path, ExpertLoad(collapse_window=1), config(num_experts=num_experts, top_k=top_k))
        run.feed(watched([counts], dropped_NK=[[0.0] * top_k]))
        assert bool(run.warned) == told, (extra, run.warned)
    message = run.warned[1][0]
    assert message.startswith(f"layer 0: the busiest of {num_experts} experts got {busiest:.2f} times an even share in")
    assert f"limit expert_load.warn_max_over_ideal={limit:g} (at {num_experts / top_k:g} every token" in message


def test_options_move_the_limits_and_switch_warnings_off(tmp_path: Path) -> None:
    def warned(**options: Any) -> list[str]:
        run = Run(tmp_path, ExpertLoad(collapse_window=1, **options), config())
        run.feed(watched([COLLAPSED]))
        return [message.split(":")[1] for message in run.warned.get(1, [])]

    both = warned()
    assert [text[:12] for text in both] == [" 2 of 4 expe", " the busiest"]
    assert warned(warn_dead_fraction=0.5) == both[1:] and warned(warn_dead_fraction=0.49) == both
    assert warned(warn_max_over_ideal=2.0) == both[:1] and len(warned(warn_max_over_ideal=1.99)) == 2
    off = Run(tmp_path, ExpertLoad(collapse_window=0), config())
    off.feed(watched([COLLAPSED]), watched([COLLAPSED]))
    assert not off.warned and len(off.logged) == 2


def test_many_layers_are_one_line(tmp_path: Path) -> None:
    run = Run(tmp_path, ExpertLoad(collapse_window=1, warn_max_over_ideal=9.0), config(num_layers=12))
    run.feed(watched([[5, 5, 6, 0]] * 7 + [[16, 0, 0, 0]] + [EVEN] * 4))
    (message,) = run.warned[1]
    assert message.startswith("layer 7: 3 of 4 experts got no token in step 1 (as in layers 0")
    assert "(as in layers 0, 1, 2, 3, 4, 5 and 1 more)" in message and "\n" not in message


@pytest.mark.parametrize(
    ("moe", "steps"),
    [
        ({"balance_loss_weight": 0.0}, ["set moe.balance_loss_weight", "set moe.router.bias_update_rate"]),
        ({"router": RouterConfig(bias_update_rate=0.001)},
         ["raise moe.router.bias_update_rate=0.001", "raise moe.balance_loss_weight=0.01"]),
        ({"router": RouterConfig(bias_update_rate=0.001), "balance_loss_weight": 0.0},
         ["raise moe.router.bias_update_rate=0.001"]),
        ({"router": RouterConfig(kind="gshard"), "capacity": CapacityConfig(factor=1.25)},
         ["raise moe.balance_loss_weight=0.01", "raise moe.capacity.factor=1.25"]),
    ],
)  # fmt: skip
def test_remedies_fit_the_configuration(tmp_path: Path, moe: dict[str, Any], steps: list[str]) -> None:
    run = Run(tmp_path, ExpertLoad(collapse_window=1), config(**moe))
    run.feed(watched([COLLAPSED]))
    remedy = run.warned[1][-1].split("; ", 1)[1]  # of the uneven load
    places = [remedy.index(step) for step in [*steps, "lower optimizer.lr or lengthen schedule.warmup_steps"]]
    assert places == sorted(places) and remedy.count("moe.") == len(steps)


def saved(callback: ExpertLoad) -> dict[str, Any]:
    """Its state through a file that is read as checkpoints are."""
    file = io.BytesIO()
    torch.save(callback.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


STORY = [EVEN, *[COLLAPSED] * 3, *[EVEN] * 2, *[SKEWED] * 4, *[EVEN] * 2, COLLAPSED]


@pytest.mark.parametrize("stop", range(len(STORY) + 1))
def test_a_resumed_run_warns_as_the_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    def run(callback: ExpertLoad) -> Run:
        return Run(tmp_path / "run", callback, config(num_layers=2))

    outputs = [watched([row, EVEN]) for row in STORY]
    options = {"collapse_window": 3, "warn_max_over_ideal": 1.9}
    whole = run(ExpertLoad(**options))
    whole.feed(*outputs)
    assert list(whole.warned) == [4, 9]  # collapse, and after a calm time a single dead expert
    first = run(ExpertLoad(**options))
    first.feed(*outputs[:stop])
    second = run(ExpertLoad(**options))
    second.callback.load_state_dict(saved(first.callback))
    second.callback.on_train_start(second.trainer, second.module)
    second.micro_batches = stop
    second.feed(*outputs[stop:])
    assert first.warned | second.warned == whole.warned
    assert first.logged | second.logged == whole.logged


def test_a_transition_begins_anew(tmp_path: Path) -> None:
    run = Run(tmp_path, ExpertLoad(collapse_window=2, warn_max_over_ideal=9.0), config())
    dead = watched([[4, 4, 8, 0]])
    run.feed(dead, dead, dead)
    run.grow(config(num_layers=3, num_experts=6))
    assert run.callback.latest_metrics == {}
    grown = watched([[8, 8, 8, 8, 16, 0]] * 3)
    run.feed(grown)
    assert run.callback.latest_metrics["moe/max_over_ideal"] == 2.0
    run.feed(grown, grown)
    assert list(run.warned) == [2, 5]  # of the old network, and with a window of its own of the new one
    assert [len(record["layers"]) for record in run.shares] == [1, 1, 1, 3, 3, 3]


def test_a_window_of_the_network_before_is_dropped_with_a_checkpoint_grown_outside(tmp_path: Path) -> None:
    first = Run(tmp_path, ExpertLoad(collapse_window=2, warn_max_over_ideal=9.0), config())
    first.feed(watched([[4, 4, 8, 0]]))
    second = Run(tmp_path, ExpertLoad(collapse_window=2), config(num_layers=2, num_experts=6))
    second.callback.load_state_dict(saved(first.callback))
    second.module.stage = 1
    second.callback.on_train_start(second.trainer, second.module)
    second.feed(watched([[8, 8, 8, 8, 8, 8]] * 2))
    assert not second.warned and second.logged

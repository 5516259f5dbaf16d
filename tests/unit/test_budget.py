"""Budgets: what steps cost, how many a budget buys, and a schedule that ends where the run ends."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from callbacks.budget import Budget, run_cost
from modules.config import ModelConfig
from modules.errors import InputError
from modules.functional.budget import RunCost, StageCost, due_step, most_steps
from modules.functional.flops import count_parameters, training_flops_per_token
from modules.functional.schedule import Pace, ScheduleConfig, learning_rate_factor
from modules.growth.stage import GrowthStage, GrowthTarget, Plateau
from modules.moe_config import MoEConfig

GROWN = RunCost(
    [
        StageCost(flops=1.0, parameters=10, seconds=0.1),
        StageCost(flops=4.0, parameters=40, seconds=0.3, trigger={"at_fraction": 0.25}, transition=2.0),
        StageCost(flops=6.0, parameters=50, seconds=0.5, trigger={"at_step": 60}, transition=1.0),
    ],
    tokens_per_step=8,
    devices=2,
)


def test_what_a_growing_run_costs() -> None:
    assert GROWN.lengths(100) == [25, 35, 40]
    assert GROWN.accelerator_seconds(100) == pytest.approx(2 * (25 * 0.1 + 2.0 + 35 * 0.3 + 1.0 + 40 * 0.5))
    assert GROWN.flops(100) == 25 + 4 * 35 + 6 * 40
    assert GROWN.lengths(40) == [10, 30, 0], "a stage behind the end does not begin"
    assert GROWN.accelerator_seconds(40) == pytest.approx(2 * (10 * 0.1 + 2.0 + 30 * 0.3))
    assert (GROWN.step_seconds, GROWN.parameters) == (0.5, 50)


@given(st.floats(0.01, 1e4), st.floats(0.001, 10))
def test_most_steps_is_the_largest_that_fits(limit: float, seconds: float) -> None:
    steps = most_steps(limit, lambda n: n * seconds)
    assert steps * seconds <= limit * (1 + 1e-9)
    assert (steps + 1) * seconds > limit * (1 - 1e-9)


@pytest.mark.parametrize("limit", [0.1, 3.0, 30.0, 300.0])
def test_most_steps_of_a_growing_run(limit: float) -> None:
    steps = most_steps(limit, GROWN.accelerator_seconds)
    assert GROWN.accelerator_seconds(steps) <= limit < GROWN.accelerator_seconds(steps + 1)


def test_stages_are_due_as_in_a_run() -> None:
    assert due_step({"at_fraction": 0.3}, 10, 8) == 3
    assert due_step({"at_tokens": 81}, 10, 8) == 11
    assert due_step({"at_step": 4}, 10, 8) == 4
    assert due_step({}, 10, 8) is None


# -- a run's length before it begins -----------------------------------------------------------------------------------

DENSE = ModelConfig(vocab_size=64, dim=16, num_layers=2, num_heads=2)
MIXED = ModelConfig(vocab_size=64, dim=16, num_layers=2, num_heads=2, moe=MoEConfig(num_experts=4, top_k=2))
RECIPE = [GrowthStage(GrowthTarget(moe=MoEConfig(num_experts=4, top_k=2)), at_fraction=0.5)]


@pytest.mark.parametrize("amount", [1e9, 3.3e9])
def test_flops_buy_steps_of_every_stage(amount: float) -> None:
    steps = Budget("flops", amount).steps(-1, run_cost([DENSE, MIXED], RECIPE, 128, 32))
    per_step = [training_flops_per_token(config, 32) * 128 for config in (DENSE, MIXED)]
    spent = [math.ceil(n / 2) * per_step[0] + (n - math.ceil(n / 2)) * per_step[1] for n in (steps, steps + 1)]
    assert spent[0] <= amount < spent[1]


def test_tokens_and_sizes_buy_steps() -> None:
    cost = run_cost([DENSE, MIXED], RECIPE, 128, 32)
    assert Budget("tokens", 1000).steps(-1, cost) == 7
    count = count_parameters(MIXED)
    assert count.active_non_embedding < count.non_embedding
    assert Budget("own_chinchilla").steps(-1, cost) == 20 * count.active_non_embedding // 128
    assert Budget("own_chinchilla", 5).steps(-1, cost) == 5 * count.active_non_embedding // 128


@pytest.mark.parametrize(
    ("mode", "amount", "max_steps", "told"),
    [
        ("tokens", 1000, 5, "trainer.max_steps=5 and budget.mode=tokens both say"),
        ("tokens", 1, -1, "buys no step"),
        ("flops", 1, -1, "buys no step"),
    ],
)
def test_lengths_that_cannot_be(mode: str, amount: float, max_steps: int, told: str) -> None:
    with pytest.raises(InputError, match=told):
        Budget(mode, amount).steps(max_steps, run_cost([DENSE], [], 128, 32))  # type: ignore[arg-type]


def test_half_a_budget_is_refused() -> None:
    for given_parts in ({"mode": "tokens"}, {"amount": 3.0}, {"mode": "flops", "amount": -1}):
        with pytest.raises(InputError, match=r"budget\.amount"):
            Budget(**given_parts)  # type: ignore[arg-type]
    waiting = [GrowthStage(GrowthTarget(dim=32), at_plateau=Plateau())]
    with pytest.raises(InputError, match="growth stage 1 waits for a plateau"):
        run_cost([DENSE, DENSE], waiting, 128, 32)


# -- the pace of a schedule --------------------------------------------------------------------------------------------

SCHEDULES = [ScheduleConfig("wsd", 10, 0.2, 0.1), ScheduleConfig("cosine", 10, final_ratio=0.1)]


@pytest.mark.parametrize("config", SCHEDULES)
def test_a_run_that_takes_all_steps_follows_its_schedule(config: ScheduleConfig) -> None:
    pace = Pace(100)
    assert pace.last_step == 100 and [pace.at(step) for step in (0, 37, 100)] == [0, 37, 100]
    assert learning_rate_factor(100, pace, config) == pytest.approx(0.1)


@pytest.mark.parametrize("config", SCHEDULES)
@given(first=st.integers(12, 60), second=st.integers(1, 30), ends=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_a_cut_run_ends_on_its_decay(config: ScheduleConfig, first: int, second: int, ends: tuple[int, int]) -> None:
    """However often it is cut: the rate is continuous where it is cut, never rises, and ends at the final one."""
    pace, paces = Pace(100), []
    for step in (first, first + second):
        if step < pace.last_step:
            end = step + min(ends[len(paces)], math.ceil(pace.total - pace.at(step)))
            cut = pace.cut(step, end)
            assert cut.at(step) == pytest.approx(pace.at(step))
            assert learning_rate_factor(step, cut, config) == pytest.approx(learning_rate_factor(step, pace, config))
            pace = cut
            paces.append(cut)
    assert learning_rate_factor(pace.last_step, pace, config) == pytest.approx(0.1)
    rates = [learning_rate_factor(step, pace, config) for step in range(pace.step, pace.last_step + 1)]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(rates))

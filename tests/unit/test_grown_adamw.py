"""AdamW with entries of different ages, against AdamW on parameters of their own."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from modules.grown_adamw import BIRTHS, GrownAdamW, warm_up_factor
from modules.growth.operation import Moments, WarmUp

SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1, "fused": True}


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64))


def extend(optimizer: GrownAdamW, small: nn.Parameter, shape: tuple[int, ...], warm_up: WarmUp) -> nn.Parameter:
    """A larger parameter in the place of a smaller one, its first entries and their state kept."""
    state = optimizer.state.pop(small)
    before = Moments(state["exp_avg"], state["exp_avg_sq"], float(state["step"]), tuple(state.get(BIRTHS, ())))
    after = warm_up.extended(before, shape)
    large = parameter(*shape)
    with torch.no_grad():
        large[tuple(slice(0, size) for size in small.shape)] = small
    optimizer.param_groups[0]["params"] = [large]
    optimizer.state[large] = {"exp_avg": after.first, "exp_avg_sq": after.second, "step": torch.tensor(after.step)}
    optimizer.state[large][BIRTHS] = list(after.births)
    return large


def test_entries_step_as_parameters_of_their_own_age_would() -> None:
    """Grown twice: by columns and rows after 5 steps, by rows after 9 more."""
    torch.manual_seed(0)
    whole = parameter(3, 4)
    optimizer = GrownAdamW([whole], **SETTINGS)
    parts: dict[str, tuple[tuple[slice, ...], nn.Parameter, torch.optim.AdamW]] = {}

    def split_off(name: str, *box: slice) -> None:
        piece = nn.Parameter(whole.detach()[box].clone())
        parts[name] = (box, piece, torch.optim.AdamW([piece], **SETTINGS))

    def train(steps: int) -> None:
        for _ in range(steps):
            gradient = torch.randn_like(whole)
            whole.grad = gradient
            for box, piece, single in parts.values():
                piece.grad = gradient[box].clone()
                single.step()
            optimizer.step()

    warm_up = WarmUp(factor=1.0, steps=0)
    split_off("first", slice(0, 3), slice(0, 4))
    train(5)
    whole = extend(optimizer, whole, (5, 6), warm_up)
    split_off("rows", slice(3, 5), slice(0, 6))
    split_off("columns", slice(0, 3), slice(4, 6))
    train(9)
    whole = extend(optimizer, whole, (7, 6), warm_up)
    split_off("more rows", slice(5, 7), slice(0, 6))
    train(7)
    for name, (box, piece, _) in parts.items():
        torch.testing.assert_close(whole.detach()[box], piece.detach(), rtol=1e-12, atol=1e-14, msg=name)


def test_without_an_age_of_their_own_new_entries_would_leap() -> None:
    """With betas of 0.9 and 0.999, in a parameter of 100,000 steps: an entry's first update, and the largest one."""
    torch.manual_seed(0)
    settings = SETTINGS | {"betas": (0.9, 0.999), "weight_decay": 0.0}
    leaps = {}
    for aged in (True, False):
        small = parameter(4, 4)
        optimizer = GrownAdamW([small], **settings)
        for _ in range(3):
            small.grad = torch.randn_like(small)
            optimizer.step()
        optimizer.state[small]["step"].fill_(1e5)
        large = extend(optimizer, small, (6, 4), WarmUp())
        if not aged:
            optimizer.state[large][BIRTHS] = []
        steps = []
        for _ in range(30):
            before = large.detach()[4:].clone()
            large.grad = torch.randn_like(large)
            optimizer.step()
            steps.append((large.detach()[4:] - before).abs().max().item() / settings["lr"])
        leaps[aged] = steps
    assert leaps[True][0] <= 1.05 < 3 < leaps[False][0]
    assert max(leaps[True]) < max(leaps[False])


def test_the_learning_rate_of_new_entries_rises_and_returns() -> None:
    birth = {"factor": 1.3, "steps": 250}
    assert [round(warm_up_factor(birth, age), 3) for age in (0, 125, 250, 375, 500, 9000)] == [1, 1.15, 1.3, 1.15, 1, 1]
    assert warm_up_factor({"factor": 1.3, "steps": 0}, 7) == 1


def test_what_has_grown_up_is_forgotten() -> None:
    small = parameter(2, 2)
    optimizer = GrownAdamW([small], **SETTINGS)
    small.grad = torch.ones_like(small)
    optimizer.step()
    large = extend(optimizer, small, (4, 2), WarmUp(steps=150))
    for step in range(1, 305):
        large.grad = torch.randn_like(large)
        optimizer.step()
        assert bool(optimizer.state[large][BIRTHS]) == (step < 300)  # 0.95^300 is below a millionth, 0.95^269 too


def test_state_survives_saving() -> None:
    torch.manual_seed(0)
    small = parameter(2, 3)
    optimizer = GrownAdamW([small], **SETTINGS)
    small.grad = torch.ones_like(small)
    optimizer.step()
    large = extend(optimizer, small, (4, 5), WarmUp(steps=20))
    twin = nn.Parameter(large.detach().clone())
    other = GrownAdamW([twin], **SETTINGS)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    large.grad = twin.grad = None
    for _ in range(5):
        gradient = torch.randn_like(large)

        def backward(parameter: nn.Parameter, gradient: torch.Tensor = gradient) -> None:
            parameter.grad = gradient.clone()

        optimizer.step(lambda: backward(large))
        other.step(lambda: backward(twin))
        large.grad = twin.grad = None  # as trainers leave them: the next closure makes them anew
    assert torch.equal(large, twin) and optimizer.state[large][BIRTHS]


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4)])
def test_what_is_new_altogether_steps_like_a_fresh_parameter(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    first, second = parameter(*shape), parameter(*shape)
    with torch.no_grad():
        second.copy_(first)
    optimizer, plain = GrownAdamW([first], **SETTINGS), torch.optim.AdamW([second], **SETTINGS)
    fresh = WarmUp(1.0, 0).new(Moments(first.detach(), first.detach(), 7.0))
    optimizer.state[first] = {"exp_avg": fresh.first, "exp_avg_sq": fresh.second, "step": torch.tensor(fresh.step)}
    optimizer.state[first][BIRTHS] = list(fresh.births)
    for _ in range(4):
        first.grad = torch.randn_like(first)
        second.grad = first.grad.clone()
        optimizer.step()
        plain.step()
    torch.testing.assert_close(first.detach(), second.detach(), rtol=1e-12, atol=1e-14)


def test_old_entries_that_move_keep_their_age_and_state() -> None:
    """Query heads grow inside their groups: old rows are not the first ones any more; twice, with columns beside."""
    torch.manual_seed(0)
    places, before = torch.tensor([0, 1, 4, 5]), torch.randn(4, 3, dtype=torch.float64)
    once = WarmUp().extended(Moments(before, before.square(), 9.0), (8, 5), {0: places, 1: torch.arange(3)})
    assert torch.equal(once.first[places, :3], before) and once.first.count_nonzero() == 12
    assert once.births[0]["old"] == [[0, 1, 4, 5], 3]
    again = torch.tensor([0, 1, 2, 3, 6, 7, 8, 9])
    twice = WarmUp().extended(once, (12, 5), {0: again})
    assert torch.equal(twice.second[again[places], :3], before.square())
    assert twice.births[0]["old"] == [[0, 1, 6, 7], 3] and twice.births[1]["old"] == [again.tolist(), 5]
    large = parameter(12, 5)
    start = large.detach().clone()
    optimizer = GrownAdamW([large], **SETTINGS | {"weight_decay": 0.0, "eps": 1e-12})
    optimizer.state[large] = {"exp_avg": twice.first, "exp_avg_sq": twice.second, "step": torch.tensor(twice.step)}
    optimizer.state[large][BIRTHS] = list(twice.births)
    large.grad = torch.ones_like(large)
    optimizer.step()
    moved = (large.detach() - start).abs() / SETTINGS["lr"]
    fresh = torch.ones(12, 5, dtype=torch.bool)
    fresh[again[places].unsqueeze(1), torch.arange(3)] = False
    newest = fresh.clone()
    newest[again] = False
    torch.testing.assert_close(moved[newest], torch.full_like(moved[newest], warm_up_factor(twice.births[1], 1)))
    assert (moved[fresh] <= 1.05).all() and fresh.sum() == 12 * 5 - 12

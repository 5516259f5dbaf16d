"""Rows, families and batches: everything is asked once, and as little as possible is computed."""

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from callbacks.evaluation import batching
from callbacks.evaluation.batching import Batch, Request, Row, distinct_rows, find_families, plan_batches
from callbacks.evaluation.company import Company
from callbacks.evaluation.lending import Lender
from modules.config import ModelConfig
from modules.layers.transformer import Transformer

Ids = list[int]


@pytest.fixture(autouse=True)
def short_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MIN_SHARED", 2)


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    """Contexts that often begin alike, continuations of some tokens."""
    beginnings = draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=3))
    found: list[Request] = []
    for _ in range(draw(st.integers(1, 12))):
        context = [*draw(st.sampled_from(beginnings)), *draw(st.lists(st.integers(0, 3), max_size=4))]
        found.append((("", ""), context, draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))))
    return found


def ids_behind(batch: Batch, place: int) -> Ids:
    """A row put together again from its family's beginning and its own end."""
    family = batch.families[batch.family_of_row[place]]
    return [*family.prefix.tolist(), *batch.suffix(place).tolist()]


@given(requests(), st.integers(1, 60))
def test_every_request_is_in_one_row_of_one_batch(asked: list[Request], budget: int) -> None:
    batches = plan_batches(distinct_rows(asked, 16), budget)
    seen: list[int] = []
    for batch in batches:
        own = sum(len(batch.suffix(place)) for place in range(len(batch.rows)))
        begun = sum(family.shared for family in batch.families)
        assert len(batch.rows) == 1 or own <= budget
        assert len(batch.families) == 1 or begun <= budget
        for place, row in enumerate(batch.rows):
            assert ids_behind(batch, place) == row.inputs.tolist()
            assert len(batch.suffix(place)) >= 1
            for index, continuation in row.requests:
                seen.append(index)
                _, context, whole = asked[index]
                assert [*context, *whole[:-1]][-16:] == row.inputs.tolist() and continuation.tolist() == whole
    assert sorted(seen) == list(range(len(asked)))


def cost(rows: list[Row], shared: int) -> int:
    """Inputs that a family computes."""
    return shared + sum(len(row.inputs) - shared for row in rows)


def least_cost(rows: list[Row]) -> int:
    """By trying every partition of rows in alphabetical order into neighbours."""
    ordered = sorted(rows, key=lambda row: row.inputs.tolist())
    count = len(ordered)
    best = None
    for number in range(count):
        for cuts in combinations(range(1, count), number):
            borders = [0, *cuts, count]
            total = 0
            for start, end in pairwise(borders):
                part = ordered[start:end]
                common = min(len(row.inputs) - 1 for row in part)
                while len({tuple(row.inputs[:common].tolist()) for row in part}) > 1:
                    common -= 1
                total += cost(part, common if len(part) > 1 and common >= batching.MIN_SHARED else 0)
            best = total if best is None else min(best, total)
    assert best is not None
    return best


@given(requests().filter(lambda asked: len(asked) <= 8))
def test_families_compute_as_little_as_possible(asked: list[Request]) -> None:
    rows = distinct_rows(asked, 16)
    families = find_families(rows)
    assert sum(cost(list(family.rows), family.shared) for family in families) == least_cost(rows)
    assert sorted(id(row) for family in families for row in family.rows) == sorted(map(id, rows))


def test_shots_are_computed_once_for_all_questions() -> None:
    shots = list(range(4, 44))
    asked: list[Request] = [(("", ""), [*shots, question], [answer]) for question in range(4) for answer in (1, 2)]
    (batch,) = plan_batches(distinct_rows(asked, 64), 1000)
    assert len(batch.families) == 1 and batch.families[0].shared == 40 and len(batch.rows) == 4
    assert batch.num_tokens == 44


def test_a_large_family_comes_in_several_batches_and_its_beginning_is_computed_once() -> None:
    shots = list(range(4, 24))
    asked: list[Request] = [(("", ""), [*shots, question], [3]) for question in range(4)]
    batches = plan_batches(distinct_rows(asked, 64), 11)
    assert [len(batch.rows) for batch in batches] == [2, 2]
    network = Transformer(ModelConfig(vocab_size=32, dim=8, num_layers=1, num_heads=2, max_seq_len=64)).eval()
    lengths: list[int] = []
    network.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    lender = Lender(network, Company(network), torch.device("cpu"))
    with torch.no_grad():
        for batch in batches:
            lender.run(batch)
    assert lengths == [20, 2, 2]


def test_thousands_of_rows_with_one_beginning_are_no_deep_recursion() -> None:
    rows: list[Any] = [Row(np.array([1, 1, 1, *np.base_repr(n, 3).encode()], np.uint32), 1) for n in range(5000)]
    families = find_families(rows)
    assert sum(len(family.rows) for family in families) == 5000

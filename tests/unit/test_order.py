"""The order of samples: permutations, exact mixing, and that it is a pure function of seed and index."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.order import BLOCK_SIZE, MixedOrder, derive_key, integer_weights, permute, permute_all
from modules.errors import InputError

mixtures = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 100)), min_size=1, max_size=6)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


@given(size=st.integers(1, 3000), keys=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
def test_permuting_many_is_permuting_each(size: int, keys: list[int]) -> None:
    indices = [(7 * number) % size for number in range(100)]
    each = [permute(index, size, keys[number % len(keys)]) for number, index in enumerate(indices)]
    key_of_each = np.resize(np.array(keys, dtype=np.uint64), 100)
    assert permute_all(np.array(indices, dtype=np.uint64), size, key_of_each).tolist() == each


@given(mixture=mixtures, index=st.integers(0, 10**8), seed=st.integers(0, 10**6))
def test_a_location_follows_from_its_definition(mixture: list[tuple[int, int]], index: int, seed: int) -> None:
    """One sample worked out alone, with Python integers."""
    sizes = [size for size, _ in mixture]
    order = MixedOrder(sizes, [weight for _, weight in mixture], seed)
    block, slot = divmod(index, BLOCK_SIZE)
    before, after = order.samples_before(block), order.samples_before(block + 1)
    place = permute(slot, BLOCK_SIZE, derive_key(seed, 0xB10C, block))
    source = 0
    while place >= after[source] - before[source]:
        place -= after[source] - before[source]
        source += 1
    epoch, nth = divmod(before[source] + place, sizes[source])
    assert order.locate(index) == (source, epoch, permute(nth, sizes[source], derive_key(seed, source, epoch)))


def test_permutations_of_different_keys_differ() -> None:
    orders = {
        tuple(permute(index, 100, derive_key(seed, 0, epoch)) for index in range(100))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_permutation_spreads_every_index_over_all_places() -> None:
    """Chi-squared of 4,000 keyed places of one index over 20 cells; 99.9 % of uniform draws lie below 43.8."""
    cells = Counter(permute(3, 20, derive_key(key)) for key in range(4000))
    assert sum((cells[cell] - 200) ** 2 / 200 for cell in range(20)) < 43.8


@given(mixture=mixtures, block=st.integers(0, 10**9))
def test_every_block_holds_the_exact_shares(mixture: list[tuple[int, int]], block: int) -> None:
    weights = [weight for _, weight in mixture]
    order = MixedOrder([size for size, _ in mixture], weights, seed=0)
    before, after = order.samples_before(block), order.samples_before(block + 1)
    assert sum(before) == block * BLOCK_SIZE
    for weight, first, last in zip(weights, before, after, strict=True):
        assert last >= first
        assert abs(first - Fraction(weight, sum(weights)) * block * BLOCK_SIZE) < 1


@given(mixture=mixtures, block=st.integers(0, 10**6))
def test_locate_gives_what_the_quotas_say(mixture: list[tuple[int, int]], block: int) -> None:
    order = MixedOrder([size for size, _ in mixture], [weight for _, weight in mixture], seed=5)
    found = Counter(order.locate(block * BLOCK_SIZE + slot).source for slot in range(BLOCK_SIZE))
    before, after = order.samples_before(block), order.samples_before(block + 1)
    assert [found[source] for source in range(len(mixture))] == [b - a for a, b in zip(before, after, strict=True)]


def test_a_source_is_read_once_per_epoch_and_then_again_in_another_order() -> None:
    order = MixedOrder([50, 3000], [0.3, 0.7], seed=1)
    windows: dict[int, list[int]] = {}
    for index in range(2 * BLOCK_SIZE):
        source, epoch, window = order.locate(index)
        if source == 0:
            windows.setdefault(epoch, []).append(window)
    complete = [epoch for epoch, seen in windows.items() if len(seen) == 50]
    assert len(complete) >= 11
    assert all(sorted(windows[epoch]) == list(range(50)) for epoch in complete)


def test_every_epoch_has_a_permutation_of_its_own() -> None:
    """Seen in which windows share a block, since the places inside a block are permuted anyway."""
    order = MixedOrder([2 * BLOCK_SIZE], [1], seed=1)
    first, other = ({order.locate(start + slot).window for slot in range(BLOCK_SIZE)} for start in (0, 2 * BLOCK_SIZE))
    assert len(first) == len(other) == BLOCK_SIZE
    assert first != other


@given(index=st.integers(0, 10**12), others=st.lists(st.integers(0, 10**6), max_size=5), seed=st.integers(0, 10**6))
def test_locate_is_pure(index: int, others: list[int], seed: int) -> None:
    used = MixedOrder([700, 31], [2, 1], seed)
    for other in others:
        used.locate(other)
    assert used.locate(index) == MixedOrder([700, 31], [2, 1], seed).locate(index)


def test_the_seed_changes_the_order_and_not_the_shares() -> None:
    first, second = (MixedOrder([900, 900], [1, 1], seed) for seed in (1, 2))
    assert [first.locate(i) for i in range(100)] != [second.locate(i) for i in range(100)]
    assert first.samples_before(7) == second.samples_before(7)


def test_sources_alternate_inside_a_block() -> None:
    """In 1,024 fair places the longest run of one source is about 10; a sorted block would have one of 512."""
    order = MixedOrder([5000, 5000], [1, 1], seed=0)
    sources = "".join(str(order.locate(index).source) for index in range(BLOCK_SIZE))
    assert "0" * 30 not in sources and "1" * 30 not in sources


def test_weights_are_read_as_decimals() -> None:
    assert integer_weights([0.1, 0.2, 0.7]) == [1, 2, 7]
    assert integer_weights([3.0, 1.5]) == [2, 1]


@pytest.mark.parametrize("weights", [[1, -1], [0.0, 1], [float("nan"), 1], [float("inf"), 1], [1e-5, 1]])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(InputError, match="mixture weight"):
        MixedOrder([10, 10], weights, seed=0)


def test_bad_sources_are_refused() -> None:
    with pytest.raises(InputError, match="0 windows"):
        MixedOrder([10, 0], [1, 1], seed=0)
    with pytest.raises(InputError, match="one weight for each"):
        MixedOrder([10], [1, 1], seed=0)

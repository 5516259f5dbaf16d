"""The order of training samples: a pure function of the seed and the global sample index.

Nothing is shuffled beforehand or iterated from the start. A sample is found by arithmetic alone, in the memory of one
block, so any rank, worker or resumed run computes the same sample for the same index.

- Inside a source, windows are visited by a keyed permutation of their number: a Feistel network over a rows x columns
  grid (the generalised Feistel construction of Black and Rogaway, 2002) with cycle walking for the few grid cells
  beyond the source. Each pass over a source (an epoch) has a permutation of its own.
- Between sources, the mixture is exact in blocks of 1,024 samples. The samples of a source before block b are its exact
  share of 1024*b, rounded by largest remainder; what rounding leaves over is thus carried to later blocks, and after
  every block no source is a whole sample away from its share. Inside a block the sources are permuted.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, isfinite, isqrt, lcm
from typing import NamedTuple, TypeVar

import numpy as np

from modules.errors import InputError

BLOCK_SIZE = 1024
_NUM_ROUNDS = 4
_BITS_64 = (1 << 64) - 1
_BLOCK_TAG = 0xB10C

Bits = TypeVar("Bits", int, np.ndarray)  # Python integers, or arrays of uint64 that wrap around


class Location(NamedTuple):
    """Where a sample lies: its source, the pass over that source, and the window inside the source."""

    source: int
    epoch: int
    window: int


def mix_bits(value: Bits) -> Bits:
    """A 64-bit hash of integers (the finaliser of SplitMix64; Steele, Lea and Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _BITS_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _BITS_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _BITS_64
    return value ^ (value >> 31)


@lru_cache(maxsize=4096)
def derive_key(*parts: int) -> int:
    """One 64-bit key from several integers; another order of the parts gives another key."""
    key = 0
    for part in parts:
        key = mix_bits(key ^ mix_bits(part & _BITS_64))
    return key


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, to split documents by what they say."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest()) / 2**56


def _walk(cell: Bits, rows: int, columns: int, key: Bits) -> Bits:
    """One walk of the Feistel network over the cells of a grid, which is a permutation of them."""
    row, column = cell // columns, cell % columns
    for round_index in range(0, _NUM_ROUNDS, 2):
        row = (row + mix_bits(key ^ (column << 3) ^ round_index) % rows) % rows
        column = (column + mix_bits(key ^ (row << 3) ^ (round_index + 1)) % columns) % columns
    return row * columns + column


def _grid(size: int) -> tuple[int, int]:
    """Rows and columns of a grid with fewer than sqrt(size) + 1 cells beyond `size`, so that a second walk is rare."""
    rows = isqrt(size - 1) + 1 if size > 1 else 1
    return rows, -(-size // rows)


def permute(index: int, size: int, key: int) -> int:
    """The place of `index` in the permutation of range(size) that belongs to `key`."""
    index = _walk(index, *_grid(size), key)
    while index >= size:
        index = _walk(index, *_grid(size), key)
    return index


def permute_all(indices: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """`permute` for each index with its own key: uint64 [N] from uint64 [N] and uint64 [N]."""
    places = _walk(indices, *_grid(size), keys)
    while (outside := places >= size).any():
        places[outside] = _walk(places[outside], *_grid(size), keys[outside])
    return places


def integer_weights(weights: Sequence[float]) -> list[int]:
    """The weights as integers in exactly the same proportions, read as the decimal numbers they are written as.

    Raises:
        InputError: for a weight that is not a positive finite number, or a share below one sample per block.
    """
    for weight in weights:
        if not isfinite(weight) or weight <= 0:
            raise InputError(
                f"mixture weight {weight} must be a positive number; leave a corpus out of the weights to skip it"
            )
    fractions = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    integers = [int(fraction * scale) for fraction in fractions]
    divisor = gcd(*integers)
    integers = [integer // divisor for integer in integers]
    for weight, integer in zip(weights, integers, strict=True):
        if integer * BLOCK_SIZE < sum(integers):
            raise InputError(
                f"mixture weight {weight} is {integer / sum(integers):.2e} of the whole, less than one sample in a "
                f"block of {BLOCK_SIZE}; raise it above {(sum(weights) - weight) / (BLOCK_SIZE - 1):.3g} or leave that "
                "corpus out"
            )
    return integers


class MixedOrder:
    """An endless mixture of sources in a fixed random order, addressed by the global sample index.

    Args:
        sizes: number of windows in each source.
        weights: relative number of samples from each source.
        seed: another seed gives another order of the same proportions.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        if len(sizes) != len(weights) or not sizes:
            raise InputError(f"{len(sizes)} sources and {len(weights)} weights; give one weight for each source")
        for size in sizes:
            if size < 1:
                raise InputError(f"a source has {size} windows; every source of a mixture needs at least 1")
        self.sizes = list(sizes)
        self.weights = integer_weights(weights)
        self.seed = seed
        self._block: tuple[int, list[Location]] | None = None

    def samples_before(self, block: int) -> list[int]:
        """How many samples each source has given before `block`: its share of 1024*block by largest remainder."""
        total, whole = block * BLOCK_SIZE, sum(self.weights)
        counts = [total * weight // whole for weight in self.weights]
        remainders = [total * weight % whole for weight in self.weights]
        # sorted() is stable: of equal remainders the earlier source goes first
        by_remainder = sorted(range(len(counts)), key=lambda source: -remainders[source])
        for source in by_remainder[: total - sum(counts)]:
            counts[source] += 1
        return counts

    def locate(self, index: int) -> Location:
        """The sample at a global index. The block around it is worked out once, for the indices that follow."""
        block, slot = divmod(index, BLOCK_SIZE)
        if self._block is None or self._block[0] != block:
            self._block = (block, self._lay_out(block))
        return self._block[1][slot]

    def _lay_out(self, block: int) -> list[Location]:
        """The samples of one block."""
        before = np.array(self.samples_before(block))
        quotas = np.array(self.samples_before(block + 1)) - before
        ends = np.cumsum(quotas)
        slots = np.arange(BLOCK_SIZE, dtype=np.uint64)
        block_key = np.full(BLOCK_SIZE, derive_key(self.seed, _BLOCK_TAG, block), dtype=np.uint64)
        places = permute_all(slots, BLOCK_SIZE, block_key).astype(np.int64)
        sources = np.searchsorted(ends, places, side="right")
        nth = (before + quotas - ends)[sources] + places
        epochs, windows = np.empty_like(nth), np.empty_like(nth)
        for source, size in enumerate(self.sizes):
            mine = sources == source
            epochs[mine] = nth[mine] // size
            # the key is derive_key(seed, source, epoch), for many epochs at once
            keys = mix_bits(derive_key(self.seed, source) ^ mix_bits(epochs[mine].astype(np.uint64)))
            windows[mine] = permute_all((nth[mine] % size).astype(np.uint64), size, keys)
        return list(map(Location, sources.tolist(), epochs.tolist(), windows.tolist()))

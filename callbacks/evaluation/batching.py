"""Forward passes for many requests: one row per distinct input, what rows have in common computed once, no padding.

Requests whose context and continuation agree up to the last token share a row: the answers A, B, C, D of a question
cost one. Rows that begin alike (the endings of a story, the questions behind the same shots) are a family: their common
beginning is computed once, and its keys and values are lent to each of them.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from modules.errors import InputError

MIN_SHARED = 16
"""Tokens that rows must have in common for their beginning to be computed apart: a pass more has a price."""
SUFFIX_STEP = 8
"""Families whose longest ends differ by fewer tokens stand beside each other."""
KEYS_PER_TOKEN = 4
"""Keys that attention may look at in a batch, padding and what is lent included, for each token of the budget."""
LARGE_ENOUGH = 1024
"""Tokens of a batch from which on it pays to begin another one rather than to pad."""
MOST_PADDING = 1.5
"""... if with the next row attention had so many times the tokens of the rows."""

Request = tuple[tuple[str, ...], Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]
"""Texts, and the ids of context and continuation: lm-eval's own order."""


@dataclass(eq=False)
class Row:
    """One forward row: its input ids, how many of its last predictions are asked for, and by which requests."""

    inputs: np.ndarray
    num_scored: int = 0
    requests: list[tuple[int, np.ndarray]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Family:
    """Rows whose first `shared` inputs are the same; a row that shares nothing is alone."""

    rows: tuple[Row, ...]
    shared: int = 0

    @property
    def prefix(self) -> np.ndarray:
        """What they have in common."""
        return self.rows[0].inputs[: self.shared]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one forward pass, behind one pass over the beginnings of their families where these are shared.

    Attributes:
        families: those that rows belong to.
        rows: what is scored.
        family_of_row: the place in `families` of each row's.
    """

    families: tuple[Family, ...]
    rows: tuple[Row, ...]
    family_of_row: tuple[int, ...]

    @property
    def has_prefix(self) -> bool:
        """Whether something is computed in front of the rows."""
        return self.families[0].shared > 0

    def suffix(self, place: int) -> np.ndarray:
        """The inputs of a row behind its family's beginning."""
        return self.rows[place].inputs[self.families[self.family_of_row[place]].shared :]

    @property
    def num_tokens(self) -> int:
        """Inputs that this batch computes."""
        prefixes = sum(family.shared for family in self.families)
        return prefixes + sum(len(self.suffix(place)) for place in range(len(self.rows)))


@dataclass
class Plans:
    """Batches of requests that were asked before: tokenizing what a suite asks takes longer than answering it."""

    known: dict[bytes, list[Batch]] = field(default_factory=dict)

    def get(self, key: Sequence[Any], texts: Sequence[tuple[str, ...]], make: Callable[[], list[Batch]]) -> list[Batch]:
        """The batches for texts, and for all else that they depend on."""
        digest = hashlib.blake2b(repr(key).encode())
        for text in texts:
            digest.update(repr(text).encode("utf-8", "surrogatepass"))
        if digest.digest() not in self.known:
            self.known[digest.digest()] = make()
        return self.known[digest.digest()]


def distinct_rows(requests: Sequence[Request], max_length: int) -> list[Row]:
    """One row per distinct input; a request's answers come from the last positions of its row.

    Raises:
        InputError: a continuation that is longer than the model's window.
    """
    rows: dict[bytes, Row] = {}
    for index, (_, context, continuation) in enumerate(requests):
        if len(continuation) == 0:
            continue
        if len(continuation) > max_length:
            raise InputError(
                f"a continuation of {len(continuation)} tokens is longer than the model's max_seq_len={max_length}; "
                "leave this task out, or evaluate a model with a longer window"
            )
        asked = np.asarray(continuation, np.uint32)
        inputs = np.concatenate([np.asarray(context, np.uint32), asked[:-1]])[-max_length:]
        row = rows.setdefault(inputs.tobytes(), Row(inputs))
        row.num_scored = max(row.num_scored, len(asked))
        row.requests.append((index, asked))
    return list(rows.values())


def plan_batches(rows: Sequence[Row], max_batch_tokens: int) -> list[Batch]:
    """All rows in batches, the longest first.

    Args:
        rows: distinct ones.
        max_batch_tokens: of a forward pass; a longer row has one of its own.
    """
    families = find_families(rows)
    alone = sorted((family for family in families if not family.shared), key=lambda family: -len(family.rows[0].inputs))
    related = sorted((family for family in families if family.shared), key=_family_order)
    batches: list[Batch] = []
    for kind in (related, alone):
        packing = _Packing(max_batch_tokens)
        for family in kind:
            for row in sorted(family.rows, key=lambda row: -len(row.inputs)):
                if not packing.has_room(family, row):
                    batches.append(packing.close())
                packing.add(family, row)
        if packing.rows:
            batches.append(packing.close())
    return batches


def find_families(rows: Sequence[Row]) -> list[Family]:
    """Rows in families, so that as few inputs as possible are computed, with one beginning for each family.

    In alphabetical order rows that begin alike are neighbours. The neighbours with the least in common split the order
    in two; a part is one family, or the best families of its two halves.
    """
    ordered = sorted(rows, key=lambda row: row.inputs.astype(">u4").tobytes())
    common = [_shared_inputs(one, other) for one, other in pairwise(ordered)]
    left, right, root = _splits(common)
    best: dict[int, int] = {-1: 0}  # inputs that are saved left and right of a split, by the split's place
    sizes: dict[int, int] = {-1: 0}
    is_family: set[int] = set()
    for split in _children_first(left, right, root):
        sizes[split] = sizes[left[split]] + sizes[right[split]] + 1
        as_one = sizes[split] * common[split] if common[split] >= MIN_SHARED else 0
        apart = best[left[split]] + best[right[split]]
        best[split] = max(as_one, apart)
        if as_one > 0 and as_one >= apart:
            is_family.add(split)
    families: list[Family] = []
    pending = [(root, 0, len(ordered))]
    while pending:
        split, start, end = pending.pop()
        if split in is_family:
            families.append(Family(tuple(ordered[start:end]), common[split]))
        elif split == -1:
            families += [Family((row,)) for row in ordered[start:end]]
        else:
            pending += [(left[split], start, split + 1), (right[split], split + 1, end)]
    return families


def _shared_inputs(one: Row, other: Row) -> int:
    """How many first inputs two rows have in common; the last one of each stays its own."""
    limit = min(len(one.inputs), len(other.inputs)) - 1
    differences = np.flatnonzero(one.inputs[:limit] != other.inputs[:limit])
    return int(differences[0]) if len(differences) else limit


def _splits(values: Sequence[int]) -> tuple[list[int], list[int], int]:
    """The tree of least values (a Cartesian tree): of each place the least one left and right of it, and the root."""
    left, right = [-1] * len(values), [-1] * len(values)
    stack: list[int] = []
    for place, value in enumerate(values):
        last = -1
        while stack and values[stack[-1]] > value:
            last = stack.pop()
        left[place] = last
        if stack:
            right[stack[-1]] = place
        stack.append(place)
    return left, right, stack[0] if stack else -1


def _children_first(left: Sequence[int], right: Sequence[int], root: int) -> list[int]:
    """All places of a tree, each behind those below it."""
    order, pending = [], [root]
    while pending:
        place = pending.pop()
        if place >= 0:
            order.append(place)
            pending += [left[place], right[place]]
    return order[::-1]


def _family_order(family: Family) -> tuple[int, int]:
    """Families with ends and beginnings of about the same length beside each other, the longest first."""
    suffix = max(len(row.inputs) for row in family.rows) - family.shared
    return -suffix // SUFFIX_STEP, -family.shared


class _Packing:
    """A batch in the making."""

    def __init__(self, max_batch_tokens: int) -> None:
        self.max_batch_tokens = max_batch_tokens
        self._clear()

    def _clear(self) -> None:
        self.families: list[Family] = []
        self.rows: list[Row] = []
        self.family_of_row: list[int] = []
        self.prefix = self.suffix = self.num_begun = self.num_own = 0

    def has_room(self, family: Family, row: Row) -> bool:
        """Whether a row may come: for the budget, and for what attention would pad. The first one always may."""
        if not self.rows:
            return True
        own, new = len(row.inputs) - family.shared, self.families[-1] is not family
        begun, tokens = self.num_begun + new * family.shared, self.num_own + own
        prefix, suffix = max(self.prefix, family.shared), max(self.suffix, own)
        rows = len(self.rows) + 1
        is_small = tokens < LARGE_ENOUGH
        return (
            tokens <= self.max_batch_tokens
            and (not new or begun <= self.max_batch_tokens)
            and rows * (prefix + suffix) <= KEYS_PER_TOKEN * self.max_batch_tokens
            and (is_small or rows * suffix <= MOST_PADDING * tokens)
        )

    def add(self, family: Family, row: Row) -> None:
        """Put a row in."""
        if not self.families or self.families[-1] is not family:
            self.families.append(family)
            self.num_begun += family.shared
        self.rows.append(row)
        self.family_of_row.append(len(self.families) - 1)
        self.num_own += len(row.inputs) - family.shared
        self.prefix = max(self.prefix, family.shared)
        self.suffix = max(self.suffix, len(row.inputs) - family.shared)

    def close(self) -> Batch:
        """The batch; the next one begins empty."""
        if self.prefix == 0:  # rows that share nothing need no families
            nothing = Family(tuple(self.rows))
            batch = Batch((nothing,), tuple(self.rows), (0,) * len(self.rows))
        else:
            batch = Batch(tuple(self.families), tuple(self.rows), tuple(self.family_of_row))
        self._clear()
        return batch

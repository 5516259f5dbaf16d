"""Finding documents that repeat test items of an evaluation: long runs of the same words.

A run of 13 words (GPT-3, arXiv 2005.14165, appendix C), in lower case and without punctuation; a Han character counts
as half a word. A test item that is shorter, but no shorter than 8 words, is looked for as a whole.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

import numpy as np

from modules.errors import InputError

WORDS = 13
LEAST_WORDS = 8
_HAN = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNIT = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+")
_IS_HAN = re.compile(f"[{_HAN}]")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))


class Decontaminator:
    """Knows the runs of words of test items.

    Args:
        items: texts of test items, by the name of their task.
        words: how long a run is.

    Attributes:
        found: documents that were told to repeat an item, by the item's task.
        num_items: items long enough to be looked for.
    """

    def __init__(self, items: Mapping[str, Iterable[str]], words: int = WORDS) -> None:
        if words < LEAST_WORDS:
            raise InputError(
                f"decontaminate_words={words} is below {LEAST_WORDS}, at which chance repeats them; {WORDS} is usual"
            )
        self.found: Counter[str] = Counter()
        self.num_items = 0
        self._size = 2 * words
        self._names = sorted(items)
        owners: dict[int, dict[int, int]] = {}  # size of a run -> its hash -> place of the task's name
        for place, name in enumerate(self._names):
            for text in items[name]:
                runs = _Runs(text)
                size = min(self._size, runs.weight)
                if size < 2 * LEAST_WORDS:
                    continue
                self.num_items += 1
                own = owners.setdefault(size, {})
                for run in runs.of(size).tolist():
                    own.setdefault(run, place)
        self._known = [(size, *_table(own)) for size, own in sorted(owners.items())]

    def repeats(self, text: str) -> str | None:
        """The task of which a text repeats an item; None where it repeats none."""
        runs = _Runs(text)
        for size, known, places in self._known:
            mine = runs.of(size)
            at = np.searchsorted(known, mine).clip(max=len(known) - 1)
            hits = np.flatnonzero(known[at] == mine)
            if len(hits):
                name = self._names[places[at[hits[0]]]]
                self.found[name] += 1
                return name
        return None


def text_fields(document: object) -> Iterator[str]:
    """All texts in a row of a data set, however deep."""
    if isinstance(document, str):
        yield document
    elif isinstance(document, Mapping):
        for value in document.values():
            yield from text_fields(value)
    elif isinstance(document, (list, tuple)):
        for value in document:
            yield from text_fields(value)


def _table(own: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Sorted hashes, and the place of the name of each."""
    runs = np.fromiter(own.keys(), np.uint64, len(own))
    order = np.argsort(runs)
    return runs[order], np.fromiter(own.values(), np.int64, len(own))[order]


class _Runs:
    """Hashes of runs of a text's words and Han characters: a polynomial in 64 bits, from sums over all before.

    Attributes:
        weight: of the whole text, in half words.
    """

    def __init__(self, text: str) -> None:
        found = _UNIT.findall(unicodedata.normalize("NFKC", text).lower())
        numbered = [_number(unit) for unit in found]
        units = np.array([number for number, _ in numbered], np.uint64)
        self._ends = np.cumsum([0, *(weight for _, weight in numbered)])
        self.weight = int(self._ends[-1])
        powers, self._inverses = (_powers(base, len(units)) for base in (_BASE, _INVERSE))
        with np.errstate(over="ignore"):
            self._sums = np.concatenate([[np.uint64(0)], np.cumsum(units * powers, dtype=np.uint64)])

    def of(self, size: int) -> np.ndarray:
        """The shortest run from each unit on that weighs `size` or more; at the end of a text there are none."""
        stop = np.searchsorted(self._ends, self._ends[:-1] + size)
        count = int(np.searchsorted(stop, len(self._ends)))
        with np.errstate(over="ignore"):
            return (self._sums[stop[:count]] - self._sums[:count]) * self._inverses[:count]


def _powers(base: np.uint64, count: int) -> np.ndarray:
    """base^0, base^1, ... modulo 2^64."""
    factors = np.full(count, base)
    factors[:1] = 1
    with np.errstate(over="ignore"):
        return np.multiply.accumulate(factors)


@lru_cache(maxsize=2**20)
def _number(unit: str) -> tuple[int, int]:
    """A number for a word or a Han character, and its weight in half words."""
    digest = hashlib.blake2b(unit.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little"), 1 if _IS_HAN.fullmatch(unit) else 2

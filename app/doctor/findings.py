"""What checks come to: tables to read, and problems with their remedies."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """Something that does not work, or that works badly.

    Attributes:
        what: what was found, with its value.
        fix: what to do about it, in one line.
        is_broken: runs would fail or be wrong; otherwise they would only be slow, or lack something.
    """

    what: str
    fix: str
    is_broken: bool = True


@dataclass
class Section:
    """A table about one subject, and what is wrong with it.

    Attributes:
        title: the subject.
        columns: their names; the first is what a row is about.
        rows: text, as many cells as columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: each row by the names of its columns."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {"title": self.title, "rows": rows, "problems": [asdict(problem) for problem in self.problems]}

"""What stands between texts and a network."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextSide:
    """A tokenizer, and the tokens that a network expects around a text.

    Attributes:
        tokenizer: with `encode`, `encode_batch`, `decode`, `eos_id` and `sha256`.
        begin_ids: what is put in front of every context; None: the end-of-text token, as in growmoe's training.
        prefix_id: what stands for an empty context; None: the last of `begin_ids`, or the end-of-text token.
        end_ids: each of them ends a generated text; None: the end-of-text token.
    """

    tokenizer: Any
    begin_ids: Sequence[int] | None = None
    prefix_id: int | None = None
    end_ids: Sequence[int] | None = None

    @property
    def begins(self) -> list[int]:
        """What is put in front of every context."""
        return [self.tokenizer.eos_id] if self.begin_ids is None else list(self.begin_ids)

    @property
    def prefix(self) -> int:
        """What stands for an empty context."""
        if self.prefix_id is not None:
            return self.prefix_id
        return self.begins[-1] if self.begins else self.tokenizer.eos_id

    @property
    def ends(self) -> list[int]:
        """What ends a generated text."""
        return [self.tokenizer.eos_id] if self.end_ids is None else list(self.end_ids)

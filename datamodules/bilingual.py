"""Training on prepared corpora in two languages, or in one, or in many."""

from pathlib import Path
from typing import Any

from datamodules.text import TextDataModule


class BilingualText(TextDataModule):
    """A weighted mixture of the corpora that `growmoe prepare` wrote into one folder.

    Corpora may share a language: loss is reported by language, weights count by corpus.

    Args:
        root: the folder that `growmoe prepare` made.
        weights: share of the training samples by corpus, e.g. `{en: 0.6, zh: 0.4}`; corpora that are not named are
            left out. Without it every corpus counts by its tokens.
        options: see `TextDataModule`.

    Raises:
        InputError: if the folder was not prepared.
    """

    def __init__(self, root: str | Path, weights: dict[str, float] | None = None, **options: Any) -> None:
        super().__init__(root, weights, **options)
        self.vocab_size  # noqa: B018  reads the tokenizer, so that a missing folder is known at once

"""Training on the bilingual synthetic world, which is made from a seed and needs no data and no network."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from datamodules.manifest import read_manifest
from datamodules.text import TextDataModule
from datamodules.world.biographies import LANGUAGES
from datamodules.world.generator import WorldConfig, generate_documents
from datamodules.world.tasks import write_world_tasks
from modules.errors import InputError

__all__ = ["SyntheticWorld", "write_world_tasks"]

_TASKS = "tasks"


class SyntheticWorld(TextDataModule):
    """Biographies of invented people, word problems and stories, each in English and Chinese; synthetic by design.

    The world is generated once, into a folder under `root` that is named after its parameters, with lm-eval tasks that
    ask what the texts say. Validation has renderings, numbers and stories that training never shows.

    Args:
        root: gets one folder per world.
        weights: share of the training samples of `en` and `zh`; without it they count by their tokens.
        num_people: people with a biography.
        num_documents: documents in each language.
        biographies: share of the documents that are biographies.
        arithmetic: share that are word problems; the rest are stories.
        max_operand: largest number that is added; sums reach twice that.
        vocab_size: token ids of the tokenizer that is trained on the world.
        world_seed: another seed makes another world; `seed` only changes the order of samples.
        options: see `TextDataModule`.
    """

    def __init__(
        self,
        root: str | Path = "runs/synthetic_world",
        weights: dict[str, float] | None = None,
        *,
        num_people: int = 64,
        num_documents: int = 8000,
        biographies: float = 0.55,
        arithmetic: float = 0.35,
        max_operand: int = 9,
        vocab_size: int = 1024,
        world_seed: int = 0,
        **options: Any,
    ) -> None:
        self.world = WorldConfig(world_seed, num_people, num_documents, biographies, arithmetic, max_operand)
        self._vocab_size = vocab_size
        parameters = json.dumps({**self.world.to_dict(), "vocab_size": vocab_size}, sort_keys=True)
        folder = Path(root) / hashlib.sha256(parameters.encode()).hexdigest()[:16]
        super().__init__(folder, weights, **options)
        if vocab_size < 512:
            raise InputError(f"data.vocab_size={vocab_size} is too small for two languages; it must be at least 512")
        self.task_dir = self._tasks = self.folder.absolute() / _TASKS

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model must know; the trained tokenizer has no more."""
        return self._vocab_size

    @property
    def languages(self) -> list[str]:
        """English and Chinese, unless the weights leave one out."""
        return [language for language in LANGUAGES if self.weights is None or language in self.weights]

    def prepare_data(self) -> None:
        """Makes the world, its tokens and its tasks, unless they are there; several processes may do so at once."""
        if not self.folder.exists():
            try:
                self._make_folder()
            except InputError:
                if not self.folder.exists():  # else another run made the same world meanwhile
                    raise
        read_manifest(self.folder)
        # the tasks name their data by absolute path, so they are written anew where a folder was moved
        write_world_tasks(self.world.to_dict(), self._tasks)

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint says about its data; `world` makes the same questions again."""
        return {**super().metadata(), "world": self.world.to_dict()}

    def _make_folder(self) -> None:
        # imported here: only the first run of a world needs what writes it
        from datamodules.shard_writer import ShardWriter
        from datamodules.tokenizer import train_tokenizer

        rank_zero_info(f"Making the synthetic world {self.folder} ({self.world.num_documents} documents per language).")
        with ShardWriter(self.folder) as writer:
            for language in LANGUAGES:
                writer.add_corpus(language, language, self._documents(language))
            tokenizer = train_tokenizer(writer.texts(), self._vocab_size)
            writer.finish(tokenizer, extra={"synthetic": True, "world": self.world.to_dict()})

    def _documents(self, language: str) -> Iterator[tuple[str, str]]:
        for document in generate_documents(self.world):
            yield ("validation" if document.held_out else "train"), document.texts[language]

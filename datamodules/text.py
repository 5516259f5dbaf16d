"""The base of all data modules: a weighted mixture of prepared corpora in an order that can be resumed exactly."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, default_collate

from datamodules.manifest import TOKENIZER, Manifest, read_manifest
from datamodules.order import BLOCK_SIZE, MixedOrder, integer_weights
from datamodules.shards import check_tokenizer, open_split
from datamodules.tokenizer import Tokenizer
from datamodules.windows import (
    FixedWindows,
    GlobalBatchSampler,
    MixedWindows,
    Sample,
    Source,
    WindowFormat,
    deal_evenly,
    num_repeated,
)
from modules.errors import InputError
from modules.world import world_of


class TextDataModule(LightningDataModule):
    """Windows of tokens from a prepared folder, for training by weight and for validation by language.

    Use it through `BilingualText` or `SyntheticWorld`, which say where the folder comes from. The trainer needs
    `max_steps` and, on several ranks, `use_distributed_sampler=False`: these loaders share the samples themselves.

    Args:
        folder: the prepared folder.
        weights: share of the training samples by corpus; without it corpora count by their tokens.
        seq_len: tokens that go into the model; a window holds one more.
        batch_size: windows in a micro-batch of one rank.
        seed: decides the order of the training samples.
        num_workers: processes that read training batches ahead; 0 reads in the training process.
        val_samples: at most so many validation windows per language, spread over all of them.
        document_mask: keep attention and positions inside documents.
        allow_data_change: resume although the data are not those of the checkpoint.
        verify_shards: compare the sha256 of every shard at the start, which reads all of it.
    """

    def __init__(
        self,
        folder: str | Path,
        weights: dict[str, float] | None = None,
        *,
        seq_len: int = 512,
        batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
        val_samples: int | None = None,
        document_mask: bool = True,
        allow_data_change: bool = False,
        verify_shards: bool = False,
    ) -> None:
        super().__init__()
        limits = {"seq_len": (seq_len, 1), "batch_size": (batch_size, 1), "num_workers": (num_workers, 0)}
        limits |= {"val_samples": (1 if val_samples is None else val_samples, 1), "seed": (seed, 0)}
        for name, (value, least) in limits.items():
            if value < least:
                raise InputError(f"data.{name}={value} is too small; it must be at least {least}")
        if weights is not None:
            _check_weights(weights)
        self.folder = Path(folder)
        self.weights = weights
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.num_workers, self.val_samples, self.document_mask = num_workers, val_samples, document_mask
        self.allow_data_change, self.verify_shards = allow_data_change, verify_shards
        self.task_dir: Path | None = None
        self._resumed_samples = self._resumed_batches = 0
        self._train: MixedWindows | None = None
        self._validation: list[FixedWindows] = []

    # What is in the folder

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the folder."""
        path = self.folder / TOKENIZER
        if not path.is_file():
            raise InputError(f"no {TOKENIZER} in {self.folder}: not a prepared folder; make one with `growmoe prepare`")
        return Tokenizer.load(path)

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model must know."""
        return self.tokenizer.vocab_size

    @cached_property
    def manifest(self) -> Manifest:
        """What the folder holds."""
        return read_manifest(self.folder)

    @cached_property
    def mixture(self) -> dict[str, float]:
        """The corpora that training uses and their relative weights.

        Without given weights each corpus counts by its training tokens, but at least one sample in 512, so that the
        smallest is seen in every block of the order.
        """
        corpora = self.manifest.corpora
        if self.weights is not None:
            for name in self.weights:
                if name not in corpora:
                    raise InputError(
                        f"data.weights: no corpus {name!r} in {self.folder}; it holds {', '.join(corpora)}"
                    )
            return dict(self.weights)
        if not corpora:
            raise InputError(f"{self.folder} holds no corpus; make it again with `growmoe prepare`")
        tokens = {name: info.splits["train"].tokens for name, info in corpora.items() if "train" in info.splits}
        least = sum(tokens.values()) * 2 // BLOCK_SIZE
        return {name: float(max(tokens.get(name, 0), least, 1)) for name in corpora}

    @property
    def languages(self) -> list[str]:
        """The languages of the mixture, sorted; a batch gives the index into this list."""
        return sorted({self.manifest.corpora[name].language for name in self.mixture})

    @property
    def bytes_per_token(self) -> dict[str, float]:
        """UTF-8 bytes of training text per token, by language."""
        ratios = {}
        for language in self.languages:
            infos = [self.manifest.corpora[name] for name in self.mixture]
            splits = [info.splits["train"] for info in infos if info.language == language]
            ratios[language] = sum(split.bytes for split in splits) / sum(split.tokens for split in splits)
        return ratios

    # Lightning's hooks

    def setup(self, stage: str) -> None:
        """Opens and checks the shards that a stage needs."""
        check_tokenizer(self.folder, self.manifest, self.tokenizer)
        if not self._validation:
            self._validation = self._open_validation()
        if stage == "fit" and self._train is None:
            sources = self._open("train", list(self.mixture))
            sizes = [self._format.num_windows(len(source.stream)) for source in sources]
            self._train = MixedWindows(sources, self._format, MixedOrder(sizes, list(self.mixture.values()), self.seed))

    def train_dataloader(self) -> DataLoader[Sample]:
        """Training batches of this rank, from the restored position to the last step."""
        if self.trainer is None or self.trainer.max_steps < 0:
            raise InputError("trainer.max_steps=-1 gives the run no end; set trainer.max_steps to the steps to train")
        assert self._train is not None, "setup('fit') comes first"
        rank, world = self._place_in_world()
        steps_to_go = self.trainer.max_steps - self.trainer.global_step
        sampler = GlobalBatchSampler(
            first_sample=self._resumed_samples,
            first_batch=self._resumed_batches,
            num_batches=self._resumed_batches + steps_to_go * self.trainer.accumulate_grad_batches,
            batch_size=self.batch_size,
            rank=rank,
            world=world,
        )
        return DataLoader(
            self._train,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> list[DataLoader[Sample]]:
        """One loader for each of `languages`: its validation windows in fixed order, shared out among the ranks."""
        rank, world = self._place_in_world()
        loaders = []
        for language, windows in zip(self.languages, self._validation, strict=True):
            if repeated := num_repeated(len(windows), self.batch_size, world):
                rank_zero_warn(
                    f"validation in {language!r}: {len(windows)} windows for {world} ranks; {repeated} count twice"
                )
            batches = deal_evenly(len(windows), self.batch_size, rank, world)
            loaders.append(DataLoader(windows, batch_sampler=batches))
        return loaders

    def held_batch(self) -> Sample:
        """One batch from validation that never changes, with samples of every language; needs `setup`."""
        if not self._validation:
            self.setup("validate")
        samples = []
        for number in range(max(self.batch_size, len(self.languages))):
            turn, language = divmod(number, len(self.languages))
            windows = self._validation[language]
            samples.append(windows[turn % len(windows)])
        return default_collate(samples)

    # Position and identity

    @property
    def consumed_samples(self) -> int:
        """Global samples that finished micro-batches have used, over all resumed parts of the run."""
        finished = self._finished_batches() - self._resumed_batches
        return self._resumed_samples + finished * self.batch_size * self._place_in_world()[1]

    @property
    def fingerprint(self) -> str:
        """One hash of everything that decides which samples training sees."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    @property
    def description(self) -> dict[str, Any]:
        """What the fingerprint is made of, in plain values."""
        corpora = {}
        for name, weight in self.mixture.items():
            train = self.manifest.corpora[name].splits["train"]
            shards = hashlib.sha256("".join(file.sha256 for file in train.files).encode()).hexdigest()
            corpora[name] = {"weight": weight, "tokens": train.tokens, "shards": shards}
        return {
            "tokenizer": self.manifest.tokenizer_sha256,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "document_mask": self.document_mask,
            "corpora": corpora,
        }

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint says about its data."""
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "languages": self.languages,
            "fingerprint": self.fingerprint,
            "world": None,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position in the data and what the data are."""
        return {
            "consumed_samples": self.consumed_samples,
            "finished_batches": self._finished_batches(),
            "fingerprint": self.fingerprint,
            "description": self.description,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the position of a checkpoint.

        Raises:
            InputError: if the data are not those of the checkpoint, unless `allow_data_change` is set.
        """
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.VALIDATING:
            self._check_tokenizer_of(state_dict["description"])
            return  # a checkpoint may be measured on any data in its tokens
        if state_dict["fingerprint"] != self.fingerprint and not self.allow_data_change:
            changes = _difference(state_dict["description"], self.description)
            raise InputError(
                f"the data are not those of the checkpoint: {changes}; restore them, or set data.allow_data_change=true"
            )
        finished = int(state_dict["finished_batches"])
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        if finished % accumulate:
            raise InputError(
                f"trainer.accumulate_grad_batches={accumulate} does not divide the checkpoint's {finished} batches, "
                "so that a step would begin in the middle; keep the former value, or one that divides"
            )
        self._resumed_samples, self._resumed_batches = int(state_dict["consumed_samples"]), finished

    # Inside

    def _check_tokenizer_of(self, description: dict[str, Any]) -> None:
        if description["tokenizer"] != self.description["tokenizer"]:
            raise InputError(
                f"the data's tokenizer ({self.description['tokenizer'][:12]}) is not the checkpoint's "
                f"({description['tokenizer'][:12]}), so ids mean other texts; prepare the data with the checkpoint's"
            )

    @cached_property
    def _format(self) -> WindowFormat:
        return WindowFormat(self.seq_len, self.tokenizer.eos_id, self.tokenizer.token_bytes, self.document_mask)

    def _open(self, split: str, names: list[str]) -> list[Source]:
        sources = []
        for name in names:
            stream = open_split(self.folder, self.manifest, name, split, verify=self.verify_shards)
            if not self._format.num_windows(len(stream)):
                raise InputError(
                    f"corpus {name!r} in {self.folder} has {len(stream)} tokens in split {split!r}, fewer than one "
                    f"window of {self.seq_len + 1}; prepare more text or lower data.seq_len"
                )
            sources.append(Source(stream, self.languages.index(self.manifest.corpora[name].language)))
        return sources

    def _open_validation(self) -> list[FixedWindows]:
        by_language: list[list[str]] = [[] for _ in self.languages]
        for name in self.mixture:
            by_language[self.languages.index(self.manifest.corpora[name].language)].append(name)
        return [FixedWindows(self._open("validation", names), self._format, self.val_samples) for names in by_language]

    def _place_in_world(self) -> tuple[int, int]:
        world = world_of(self.trainer)
        return world.data_rank, world.data_ranks

    def _finished_batches(self) -> int:
        """Micro-batches of the run that are done; Lightning keeps the count over resumed parts."""
        if self.trainer is None:
            return self._resumed_batches
        total = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(getattr(total, "processed"))  # noqa: B009  Lightning's annotation is of a base class without it


def _check_weights(weights: dict[str, float]) -> None:
    if not weights:
        raise InputError("data.weights={} names no corpus; name at least one, or leave weights out")
    try:
        integer_weights(list(weights.values()))
    except InputError as error:
        raise InputError(f"data.weights={weights}: {error}") from None


def _difference(then: Any, now: Any, key: str = "") -> str:
    """Names every value of two nested dictionaries that differs."""
    if isinstance(then, dict) and isinstance(now, dict):
        parts = []
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name):
                parts.append(_difference(then.get(name), now.get(name), f"{key}.{name}" if key else name))
        return ", ".join(parts)
    old, new = (str(value)[:12] if isinstance(value, str) else str(value) for value in (then, now))
    return f"{key} was {old}, is {new}"

"""Byte-level BPE tokenizers: training them, and the few things that the rest of the program asks of one."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers

from modules.errors import InputError
from modules.hugging_face.special_tokens import BOS, END_OF_TEXT, EOS, PAD

_NUM_RESERVED = 256 + 3  # every byte and the three special tokens

# The split of GPT-4 and Llama 3, with runs of Han characters apart from other letters and from punctuation: a word of
# Latin letters inside Chinese text stays a word, and Chinese punctuation never merges with what follows it.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}&&[^\p{{Han}}]]+"
    r"|\p{{Han}}+"
    r"|\p{{N}}{{1,{digits}}}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to token ids and back. Text produces no special tokens, also where it spells one, unless asked to."""

    def __init__(self, text: str, eos_id: int | None = None, *, strict: bool = True) -> None:
        """Builds the tokenizer from the text of a `tokenizer.json`; see `load`, `from_json` and `train_tokenizer`."""
        try:
            self._inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            reason = str(error).splitlines()[0]
            raise InputError(f"not a tokenizer.json: {reason}; give a file written by the tokenizers library") from None
        self._text = text
        self._inner.no_padding()
        self._inner.no_truncation()
        self._inner.encode_special_tokens = True
        self._eos_id = self._find_eos() if eos_id is None else eos_id
        if strict:
            self._check_eos()

    @classmethod
    def load(cls, path: str | Path, eos_id: int | None = None) -> "Tokenizer":
        """Reads a `tokenizer.json`; `eos_id` as in `from_json`.

        Raises:
            InputError: if the file is missing, is no tokenizer, or has no end-of-text token.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"tokenizer {path} cannot be read: {error.strerror}; give a tokenizer.json") from None
        except UnicodeDecodeError:
            raise InputError(f"tokenizer {path} is not UTF-8 text; give a tokenizer.json") from None
        try:
            return cls(text, eos_id)
        except InputError as error:
            raise InputError(f"tokenizer {path}: {error}") from None

    @classmethod
    def from_json(cls, text: str, eos_id: int | None = None, *, strict: bool = True) -> "Tokenizer":
        """The tokenizer that `to_json` wrote, or another of the tokenizers library.

        Args:
            text: the content of a `tokenizer.json`.
            eos_id: the end-of-text token, where its name does not tell.
            strict: refuse a tokenizer without end-of-text token, or with one outside its vocabulary. Models that were
                trained elsewhere may do without, or have ids of their own: `eos_id` then refuses when it is asked for.
        """
        return cls(text, eos_id, strict=strict)

    def to_json(self) -> str:
        """The text of the `tokenizer.json`, byte for byte as it was loaded or trained."""
        return self._text

    @property
    def eos_id(self) -> int:
        """The end-of-text token; raises `InputError` where there is none."""
        if self._eos_id is None:
            raise InputError(f"no end-of-text token; the vocabulary needs one of {', '.join(END_OF_TEXT)}")
        return self._eos_id

    @property
    def sha256(self) -> str:
        """Identity of the tokenizer: the hash of its JSON text."""
        return hashlib.sha256(self._text.encode()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token spells: int64 [V], 0 for special tokens.

        Exact for byte-level vocabularies. In SentencePiece-like ones, where the marker for a space is one byte, a space
        that the tokenizer adds in front of a text is counted too.
        """
        is_byte_level = '"ByteLevel"' in json.dumps(json.loads(self._text)["decoder"])
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._inner.get_vocab(with_added_tokens=False).items():
            if is_byte_level:
                sizes[index] = len(token)  # one printable character stands for each byte
            elif len(token) == 6 and token.startswith("<0x"):
                sizes[index] = 1
            else:
                sizes[index] = len(token.replace("\u2581", " ").encode())
        for index, added in self._inner.get_added_tokens_decoder().items():
            sizes[index] = 0 if added.special else len(added.content.encode())
        return sizes

    def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """Token ids of a text; nothing is put in front or behind.

        Args:
            text: any text.
            special_tokens: where the text spells a special token, as the markup of a chat does, take it as that token.
                Not for text that others wrote: it could then end the document.
        """
        self._inner.encode_special_tokens = not special_tokens
        try:
            return self._inner.encode(text, add_special_tokens=False).ids
        finally:
            self._inner.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, without special tokens; uses every core."""
        return [encoding.ids for encoding in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are left out."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def special_id(self, text: str) -> int | None:
        """The special token that is spelled so, if there is one; `decode` leaves such tokens out."""
        found = self._inner.get_added_tokens_decoder().items()
        return next((index for index, added in found if added.special and added.content == text), None)

    def _check_eos(self) -> None:
        if not 0 <= self.eos_id < self.vocab_size:
            raise InputError(
                f"end-of-text token {self.eos_id} is outside the tokenizer's vocabulary of {self.vocab_size}; "
                "use the tokenizer that belongs to the model"
            )

    def _find_eos(self) -> int | None:
        ids = (self._inner.token_to_id(name) for name in END_OF_TEXT)
        return next((index for index in ids if index is not None), None)


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, max_digits: int = 1) -> Tokenizer:
    """Trains a byte-level BPE tokenizer; the same texts always give the same tokenizer.

    Ids 0, 1, 2 are <|bos|>, <|eos|>, <|pad|>; all 256 bytes are in the vocabulary, so every text can be spelled.

    Args:
        texts: training text, read once.
        vocab_size: upper limit on the number of tokens; a small text may give fewer.
        max_digits: longest run of digits in one token. Single digits make arithmetic learnable for small models.
    """
    if vocab_size < _NUM_RESERVED:
        raise InputError(
            f"vocabulary of {vocab_size} is too small; all bytes and special tokens need at least {_NUM_RESERVED}"
        )
    if not 1 <= max_digits <= 3:
        raise InputError(f"max_digits={max_digits} is out of range; choose 1, 2 or 3")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(_SPLIT.format(digits=max_digits)), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with tokenizer_threads(True):
        inner.train_from_iterator(texts, trainer=trainer)
    return Tokenizer(inner.to_str())


@contextmanager
def tokenizer_threads(allowed: bool) -> Iterator[None]:
    """Lets the tokenizer use a thread per core or, where processes share the cores already, only one."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true" if allowed else "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before

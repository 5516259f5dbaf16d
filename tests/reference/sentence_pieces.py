"""Small tokenizers with the decoders of SentencePiece models, built with the tokenizers library."""

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from datamodules.tokenizer import Tokenizer

_WORDS = ["▁the", "▁fox", "▁quick", "▁lazy", "dog", "ov", "er", "jumps", "▁▁", "\n\n"]
_LETTERS = sorted({*"abcdefghijklmnopqrstuvwxyz.,\n▁你好世界，。"})

SENTENCE_PIECE_LIKE = ("byte fallback", "metaspace")


def inner_sentence_piece_like(kind: str, num_bytes: int = 256) -> tokenizers.Tokenizer:
    """<unk>, <s>, </s> are 0, 1, 2. `byte fallback` is put together as Llama 2's is, `metaspace` as older ones are.

    With no bytes, whatever a model writes is text.
    """
    vocabulary: dict[str, int] = {}
    pieces = [*_WORDS, *_LETTERS]
    prefixes = [piece[:end] for piece in pieces for end in range(1, len(piece))]
    for piece in ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(num_bytes)), *prefixes, *pieces]:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = list(dict.fromkeys((word[:end], word[end]) for word in _WORDS for end in range(1, len(word))))
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=num_bytes > 0)
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    if kind == "metaspace":
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    else:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    return inner


def sentence_piece_like(kind: str) -> Tokenizer:
    """The same as growmoe reads it."""
    return Tokenizer.from_json(inner_sentence_piece_like(kind).to_str())

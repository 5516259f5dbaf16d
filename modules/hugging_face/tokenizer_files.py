"""Tokenizers and the small files beside them: what stands in front of a text, what ends one, and what is written."""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from modules.errors import InputError

SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that are kept as they are, and written back."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_END_OF_TEXT = ("<|eos|>", "<|endoftext|>", "</s>", "<|im_end|>")
_PADDING = "<|pad|>"


def load_tokenizer(text: str, source: str) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json; raises `InputError` when it is none."""
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{source} is not a tokenizer.json ({reason}); give a file written by the tokenizers library"
        ) from None


def begin_ids(tokenizer_json: str, source: str) -> list[int]:
    """The ids that a tokenizer puts in front of every text.

    The post-processor of tokenizer.json says so; `add_bos_token` of tokenizer_config.json counts only where there is no
    tokenizer.json, as in transformers 5.

    Args:
        tokenizer_json: its text.
        source: for messages.
    """
    tokenizer = load_tokenizer(tokenizer_json, source)
    tokenizer.no_padding()
    encoding = tokenizer.encode("a", add_special_tokens=True)
    begin: list[int] = []
    for index, added in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
        if not added:
            break
        begin.append(index)
    return begin


def end_ids(generation: Mapping[str, Any], config: Mapping[str, Any]) -> list[int]:
    """The ids that end a text: those of generation_config.json, or else of config.json."""
    found = generation.get("eos_token_id")
    found = config.get("eos_token_id") if found is None else found
    ids = found if isinstance(found, list) else [] if found is None else [found]
    return [index for index in ids if isinstance(index, int)]


def largest_id(tokenizer_json: str, source: str) -> int:
    """The largest id that a tokenizer gives."""
    return max(load_tokenizer(tokenizer_json, source).get_vocab(with_added_tokens=True).values())


def with_begin_token(tokenizer_json: str) -> tuple[str, dict[str, int | None]]:
    """A tokenizer.json of a model trained here that puts the end-of-text token in front of every text.

    growmoe conditions every prompt on that one token. Returns the text, and the ids for config.json.
    """
    tokenizer = load_tokenizer(tokenizer_json, "the checkpoint's tokenizer.json")
    name = next((name for name in _END_OF_TEXT if tokenizer.token_to_id(name) is not None), None)
    if name is None:
        return tokenizer_json, {}
    end, padding = tokenizer.token_to_id(name), tokenizer.token_to_id(_PADDING)
    content = json.loads(tokenizer_json)
    front = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": part, "type_id": place}} for place, part in enumerate("AB"))
    template = {
        "type": "TemplateProcessing",
        "single": [front, first],
        "pair": [front, first, second],
        "special_tokens": {name: {"id": name, "ids": [end], "tokens": [name]}},
    }
    before = content.get("post_processor")
    chain = {"type": "Sequence", "processors": [before, template]}
    content["post_processor"] = template if before is None else chain
    return dump(content), {"bos_token_id": end, "eos_token_id": end, "pad_token_id": padding}


def own_files(tokenizer_json: str | None, ids: Mapping[str, Any], max_seq_len: int) -> dict[str, str]:
    """The files beside tokenizer.json of a model trained here."""
    files = {"generation_config.json": dump({key: ids[key] for key in TOKEN_IDS if ids.get(key) is not None})}
    if tokenizer_json is None or "eos_token_id" not in ids:
        return files
    tokenizer = load_tokenizer(tokenizer_json, "the checkpoint's tokenizer.json")
    name = tokenizer.id_to_token(ids["eos_token_id"])
    names = {"bos_token": name, "eos_token": name}
    if ids.get("pad_token_id") is not None:
        names["pad_token"] = tokenizer.id_to_token(ids["pad_token_id"])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
        "split_special_tokens": True,  # text never produces special tokens, also where it spells one
        **names,
    }
    return files | {"tokenizer_config.json": dump(settings), "special_tokens_map.json": dump(names)}


def dump(content: Any) -> str:
    """JSON text that is the same for the same content."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

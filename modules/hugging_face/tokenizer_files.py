"""Tokenizers and the small files beside them: what stands in front of a text, what ends one, and what is written."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import tokenizers

from modules.errors import InputError
from modules.hugging_face.special_tokens import END_OF_TEXT, PAD

SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that are kept as they are, and written back."""
_GENERATION = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ADDING = {"TemplateProcessing", "BertProcessing", "RobertaProcessing"}
"""Steps of a post-processor that put tokens around a text."""
_OTHER_IDS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias")
"""Keys of generation_config.json, beside those that end in _token_id, that hold ids."""


_Translate = Callable[[str, int], int | None]
"""From a key such as eos_token_id and an id under it to the id in another tokenizer, None if there is none."""


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
    tokenizer.no_truncation()
    encoding = tokenizer.encode("a", add_special_tokens=True)
    begin: list[int] = []
    for index, added in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
        if not added:
            break
        begin.append(index)
    return begin


def special_ids(record: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The special ids of a config.json or generation_config.json: for each name an integer, a list of them, or None.

    Raises:
        InputError: anything else.
    """
    found = {name: record.get(name) for name in TOKEN_IDS}
    for name, value in found.items():
        for index in _listed(value):
            if not isinstance(index, int) or isinstance(index, bool):
                raise InputError(f"{source}: {name}={str(value)[:80]!r} is no token id, nor a list of them; correct it")
    return found


def end_ids(generation: Mapping[str, Any], config: Mapping[str, Any]) -> list[int]:
    """The ids that end a text: those of generation_config.json, or else of config.json; both as `special_ids` gives."""
    found = generation.get("eos_token_id")
    return list(_listed(config.get("eos_token_id") if found is None else found))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def largest_id(tokenizer_json: str, source: str) -> int:
    """The largest id that a tokenizer gives."""
    return max(load_tokenizer(tokenizer_json, source).get_vocab(with_added_tokens=True).values())


def with_begin_token(tokenizer_json: str) -> tuple[str, dict[str, int | None]]:
    """A tokenizer.json of a model trained here that puts the end-of-text token in front of every text.

    growmoe conditions every prompt on that one token, whatever the tokenizer itself would put around a text. Returns
    the text, and the ids for config.json.

    Raises:
        InputError: there is no end-of-text token.
    """
    tokenizer = load_tokenizer(tokenizer_json, "the checkpoint's tokenizer.json")
    found = _end_of_text(tokenizer)
    if found is None:
        raise InputError(
            "the checkpoint's tokenizer.json has no end-of-text token, which stands in front of every text; the "
            f"vocabulary needs one of {', '.join(END_OF_TEXT)}"
        )
    name, end = found
    content = json.loads(tokenizer_json)
    content |= {"padding": None, "truncation": None}  # growmoe does neither
    front = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": part, "type_id": place}} for place, part in enumerate("AB"))
    template = {
        "type": "TemplateProcessing",
        "single": [front, first],
        "pair": [front, first, second],
        "special_tokens": {name: {"id": name, "ids": [end], "tokens": [name]}},
    }
    steps = [*_steps_without_tokens(content.get("post_processor")), template]
    content["post_processor"] = {"type": "Sequence", "processors": steps} if len(steps) > 1 else template
    return dump(content), {"bos_token_id": end, "eos_token_id": end, "pad_token_id": tokenizer.token_to_id(PAD)}


def _end_of_text(tokenizer: tokenizers.Tokenizer) -> tuple[str, int] | None:
    """Name and id of the token that ends a text, as `datamodules.tokenizer` finds it."""
    found = ((name, tokenizer.token_to_id(name)) for name in END_OF_TEXT)
    return next(((name, index) for name, index in found if index is not None), None)


def _steps_without_tokens(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a post-processor, but for those that put tokens around a text."""
    if processor is None or processor["type"] in _ADDING:
        return []
    if processor["type"] != "Sequence":
        return [processor]
    return [step for part in processor["processors"] for step in _steps_without_tokens(part)]


def own_files(tokenizer_json: str | None, ids: Mapping[str, Any], max_seq_len: int) -> dict[str, str]:
    """The files beside tokenizer.json of a model trained here."""
    files = {_GENERATION: dump({key: ids[key] for key in TOKEN_IDS if ids.get(key) is not None})}
    if tokenizer_json is None or "eos_token_id" not in ids:
        return files
    tokenizer = load_tokenizer(tokenizer_json, "the checkpoint's tokenizer.json")
    settings = {
        "model_max_length": max_seq_len,
        "split_special_tokens": True,  # text never produces special tokens, also where it spells one
    }
    return files | _settings_files(tokenizer, ids, settings)


def _settings_files(
    tokenizer: tokenizers.Tokenizer, ids: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, str]:
    """The files that say how transformers reads tokenizer.json: as it is, with these special tokens."""
    names = {}
    for key in TOKEN_IDS:
        if _listed(ids.get(key)):
            names[key.removesuffix("_id")] = tokenizer.id_to_token(_listed(ids[key])[0])
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    content = {**fixed, **settings, **names}
    return {"tokenizer_config.json": dump(content), "special_tokens_map.json": dump(names)}


# -- another tokenizer -------------------------------------------------------------------------------------------------


def with_tokenizer(origin: Mapping[str, Any], before: str | None, tokenizer_json: str, source: str) -> dict[str, Any]:
    """The origin of a model from elsewhere that gets another tokenizer: its ids, and no files about the old one.

    A text ends with the tokens that ended one before, by their names; where those are not known, with the ids that
    ended one before if they are called like an end of text, or else with the first token that is.

    Args:
        origin: that of the `HuggingFaceModel`.
        before: text of its own tokenizer.json, if it has one.
        tokenizer_json: text of the new one.
        source: of the new one, for messages.
    """
    if tokenizer_json == before:
        return dict(origin)
    new = load_tokenizer(tokenizer_json, source)
    translate = _translation(None if before is None else load_tokenizer(before, "the model's tokenizer.json"), new)
    begin = begin_ids(tokenizer_json, source)
    end = _translated("eos_token_id", origin["end_ids"], translate)
    named = _end_of_text(new)
    if not end and named is not None:
        end = [named[1]]
    ids: dict[str, Any] = {"eos_token_id": end[0] if len(end) == 1 else end or None}
    for key, instead in (("bos_token_id", begin[0] if begin else None), ("pad_token_id", new.token_to_id(PAD))):
        known = _translated(key, _listed(origin.get("token_ids", {}).get(key)), translate)
        ids[key] = known[0] if known else instead
    generation = origin["files"].get(_GENERATION)
    files = {_GENERATION: generation} if generation and _ids_stay(json.loads(generation), translate) else {}
    return {
        **origin,
        "files": {**files, **_settings_files(new, ids, {})},
        "begin_ids": begin,
        "end_ids": end,
        "token_ids": ids,
    }


def _translated(key: str, ids: Iterable[int], translate: _Translate) -> list[int]:
    found = [translate(key, index) for index in ids]
    return list(dict.fromkeys(index for index in found if index is not None))


def _ids_stay(generation: Mapping[str, Any], translate: _Translate) -> bool:
    """Whether every id of a generation_config.json means in the new tokenizer what it meant before."""
    if any(generation.get(key) for key in _OTHER_IDS):
        return False
    ids = [(key, index) for key in generation if key.endswith("_token_id") for index in _listed(generation[key])]
    return all(isinstance(index, int) and translate(key, index) == index for key, index in ids)


def _translation(old: tokenizers.Tokenizer | None, new: tokenizers.Tokenizer) -> _Translate:
    """From the special ids of an old tokenizer, or of an unknown one, to those of a new one; None where it has none."""
    special = {index for index, added in new.get_added_tokens_decoder().items() if added.special}

    def translate(key: str, index: int) -> int | None:
        if not 0 <= index < 2**32:
            return None
        if old is not None:
            name = old.id_to_token(index)
            return None if name is None else new.token_to_id(name)
        fits = new.id_to_token(index) in END_OF_TEXT if key == "eos_token_id" else index in special
        return index if fits else None

    return translate


def dump(content: Any) -> str:
    """JSON text that is the same for the same content."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

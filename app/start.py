"""A run that starts with the model of another checkpoint: imported, grown, or trained elsewhere."""

import sys
from pathlib import Path

from tokenizers import Tokenizer

from app import checkpoint as store
from datamodules.text import TextDataModule
from modules.errors import InputError
from modules.language_model import LanguageModel


def start_from(path: Path, model: LanguageModel, datamodule: TextDataModule) -> None:
    """Give `model` the architecture and the weights of a checkpoint, whose tokenizer must be the data's.

    Raises:
        InputError: no checkpoint, a damaged one, another architecture than the configuration's, another tokenizer.
    """
    record, weights = store.read_metadata(path), store.open_weights(path)
    known = weights.specs["embedding.weight"].shape[0]
    if datamodule.vocab_size > known:
        raise InputError(
            f"the data's tokenizer has {datamodule.vocab_size} tokens, and model.start_from={path} knows {known}; "
            "prepare the data with the model's own tokenizer"
        )
    tokenizer_json = store.read_tokenizer_json(path)
    if tokenizer_json is not None and _vocabulary(tokenizer_json) != _vocabulary(datamodule.tokenizer.to_json()):
        raise InputError(
            f"the data was prepared with another tokenizer than that of model.start_from={path}; prepare it again with "
            f"--tokenizer {path / store.TOKENIZER}"
        )
    model.begin_with(record, weights)
    origin = record.get("origin")
    if origin is not None and origin["begin_ids"] != [datamodule.tokenizer.eos_id]:
        sys.stderr.write(
            f"growmoe: texts of {path} began with {origin['begin_ids'] or 'no special token'}; documents of the data "
            f"begin with end-of-text ({datamodule.tokenizer.eos_id})\n"
        )


def _vocabulary(tokenizer_json: str) -> dict[str, int]:
    return Tokenizer.from_str(tokenizer_json).get_vocab(with_added_tokens=True)

"""Text for training: tokens on disk, the order they are read in, and the LightningDataModules around them.

The data modules are loaded on first use, so that reading a tokenizer does not import Lightning.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "BilingualText": "datamodules.bilingual",
    "SyntheticWorld": "datamodules.synthetic_world",
    "TextDataModule": "datamodules.text",
}

__all__ = ["BilingualText", "SyntheticWorld", "TextDataModule"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'datamodules' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

"""Models in the format of Hugging Face: directories of config.json, safetensors and a tokenizer, read and written.

Read in this order: `families` (for each family what its config.json, tensors and limits are, from `keys`, `rows` and
`requirements`), `configs`, `layout` and `tensors` (our configuration and weights as theirs and back), `reading`,
`writing`. What is named here is imported when it is asked for: `special_tokens` is for programs without torch too.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modules.hugging_face.families import FAMILIES
    from modules.hugging_face.reading import HuggingFaceModel, open_directory
    from modules.hugging_face.writing import write_directory

__all__ = ["FAMILIES", "HuggingFaceModel", "open_directory", "write_directory"]
_PLACES = {
    "FAMILIES": "families",
    "HuggingFaceModel": "reading",
    "open_directory": "reading",
    "write_directory": "writing",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)

"""Models in the format of Hugging Face: directories of config.json, safetensors and a tokenizer, read and written.

Read in this order: `families` (for each family what its config.json, tensors and limits are, from `keys`, `rows` and
`requirements`), `configs`, `layout` and `tensors` (our configuration and weights as theirs and back), `reading`,
`writing`.
"""

from modules.hugging_face.families import FAMILIES
from modules.hugging_face.reading import HuggingFaceModel, open_directory
from modules.hugging_face.writing import write_directory

__all__ = ["FAMILIES", "HuggingFaceModel", "open_directory", "write_directory"]

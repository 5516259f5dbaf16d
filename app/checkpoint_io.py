"""Lightning's seam to the disk: its checkpoints go through `app.checkpoint`."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO

from app import checkpoint as store
from modules.language_model import CHECKPOINT_KEY


class DirectoryCheckpointIO(CheckpointIO):
    """Writes and reads checkpoint directories.

    Args:
        tokenizer_json: goes into each checkpoint.
        record: goes into each manifest beside the model's own record: the data's metadata and the resolved configuration.
    """

    def __init__(self, tokenizer_json: str = "", record: dict[str, Any] | None = None) -> None:
        self.tokenizer_json = tokenizer_json
        self.record = record or {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write one checkpoint; the model's record moves from the state to the manifest, where it is read first."""
        model_record = checkpoint[CHECKPOINT_KEY]
        metadata = {
            "step": checkpoint["global_step"],
            **model_record,
            **self.record,
            "versions": store.library_versions(),
        }
        store.write_checkpoint(Path(path), checkpoint, self.tokenizer_json, metadata)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read one checkpoint, verified, to the CPU unless told otherwise."""
        return store.load_state(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete one checkpoint."""
        store.remove_checkpoint(Path(path))

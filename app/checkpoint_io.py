"""Lightning's seam to the disk: its checkpoints go through `app.checkpoint`."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO

from app import checkpoint as store
from datamodules.text import TextDataModule
from modules.config import CHECKPOINT_KEY


class DirectoryCheckpointIO(CheckpointIO):
    """Writes and reads checkpoint directories.

    Args:
        datamodule: its tokenizer goes into each checkpoint, its metadata into each manifest.

    Attributes:
        record: what else goes into each manifest, such as the resolved configuration.
    """

    def __init__(self, datamodule: TextDataModule) -> None:
        self.datamodule = datamodule
        self.record: dict[str, Any] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write one checkpoint; the model's record also goes into the manifest, where it is read first."""
        weights, state = store.split_state(checkpoint)
        store.write_checkpoint(Path(path), weights=weights, state=state, **self.describe(checkpoint))

    def describe(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """What goes into a checkpoint beside Lightning's: its metadata, and the text of the tokenizer."""
        metadata = {
            "step": checkpoint["global_step"],
            "tokens": self.datamodule.consumed_samples * self.datamodule.seq_len,
            **checkpoint[CHECKPOINT_KEY],
            "data": self.datamodule.metadata(),
            "data_position": self.datamodule.state_dict(),
            **self.record,
            "versions": store.library_versions(),
        }
        return {"metadata": metadata, "tokenizer_json": self.datamodule.tokenizer.to_json()}

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read one checkpoint, verified, to the CPU unless told otherwise."""
        return store.load_state(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete one checkpoint."""
        store.remove_checkpoint(Path(path))

"""Which checkpoint a run continues from, and whether its run directory may be written to."""

from pathlib import Path

from app import checkpoint as store
from app.checkpoint_folder import list_checkpoints, newest_valid
from modules.errors import InputError

LOGS = ("metrics.csv", "transitions.jsonl", "expert_load.jsonl", "language_load.jsonl", "monitor.jsonl")


def choose_checkpoint(run_dir: Path, requested: str | None, is_writer: bool = True) -> tuple[Path | None, list[Path]]:
    """Resolve `--ckpt_path`: a checkpoint directory, or `auto` for the newest valid one of the run directory.

    Args:
        is_writer: this process writes to the run directory, and so refuses one that holds another run; what others
            see there may be its first files.

    Returns:
        The checkpoint (None: start from the beginning) and the damaged ones that `auto` passed over.

    Raises:
        InputError: no such checkpoint; `auto` finds only damaged ones; or the directory holds another run already.
    """
    folder = run_dir / "checkpoints"
    if requested == "auto":
        chosen, damaged = newest_valid(folder)
        if chosen is None and damaged:
            raise InputError(
                f"--ckpt_path auto finds no valid checkpoint in {folder}: {', '.join(path.name for path in damaged)} "
                "are damaged; name an older copy, or start a new run in another trainer.default_root_dir"
            )
        if chosen is not None:
            return chosen, damaged
        requested = None
    if requested is None:
        _refuse_used(
            is_writer,
            run_dir,
            f"--ckpt_path auto continues it{'' if list_checkpoints(folder) else ' once it has saved'}",
        )
        return None, []
    path = Path(requested)
    if path.is_symlink():  # the link to the best one: by its own name it is among its like
        path = path.parent / path.resolve().name
    store.read_metadata(path)
    if path.resolve().parent != folder.resolve():
        _refuse_used(is_writer, run_dir, f"{path} is not one of its checkpoints")
    return path, []


def _refuse_used(is_writer: bool, run_dir: Path, reason: str) -> None:
    if not is_writer:
        return
    used = [name for name in LOGS if (run_dir / name).exists()]
    if used or list_checkpoints(run_dir / "checkpoints"):
        raise InputError(
            f"trainer.default_root_dir={run_dir} already holds a run ({', '.join(used) or 'checkpoints'}), "
            f"and {reason}; choose another directory for a new run"
        )

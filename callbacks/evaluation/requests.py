"""The requests of a task, built once: what takes seconds to build is kept on the disk, under versions and data."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dill
from lm_eval.evaluator_utils import get_sample_size

from modules.files import replace_file

WORTH_KEEPING_S = 2.0
"""Building MMLU with shots takes 65 s, most tasks less than one."""
_FORMAT = 1


def cache_folder() -> Path:
    """Where built requests are kept: LM_HARNESS_CACHE_PATH, as for lm-eval's own, or below the user's cache."""
    own = os.environ.get("LM_HARNESS_CACHE_PATH")
    if own:
        return Path(own) / "growmoe"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "growmoe" / "requests"


@contextmanager
def built_requests(task: Any, limit: int | float | None) -> Iterator[list[Any]]:
    """Give a task its requests, and keep lm-eval from building them again; afterwards the task has none.

    (Those of MMLU hold 250 MB of prompts.) lm-eval's own cache knows a task by its name and shots alone, and builds all
    of them where a few are asked for.

    Args:
        task: with its data, its shots and its seed.
        limit: documents at most; below 1, a share of them.
    """
    path = _place_of(task, limit)
    requests = None if path is None else _read(path)
    if requests is None:
        requests = _build(task, limit, path)
    task._instances = requests
    task.build_all_requests = lambda **settings: None
    try:
        yield requests
    finally:
        del task.build_all_requests
        task._instances = None


def digest(requests: list[Any]) -> str:
    """A hash of what is asked: documents, prompts, shots, settings of generation."""
    found = hashlib.sha256()
    document = None
    for request in requests:
        if request.doc_id != document:
            document = request.doc_id
            found.update(json.dumps(request.doc, default=repr, sort_keys=True).encode("utf-8", "surrogatepass"))
        found.update(repr((request.request_type, request.args)).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def _build(task: Any, limit: int | float | None, path: Path | None) -> list[Any]:
    began = time.perf_counter()
    task.build_all_requests(limit=get_sample_size(task, limit), rank=0, world_size=1)
    requests = task.instances
    if path is not None and time.perf_counter() - began > WORTH_KEEPING_S:
        _write(path, requests)
    return requests


def _place_of(task: Any, limit: int | float | None) -> Path | None:
    """The file of a task's requests; None where its data have no fingerprints."""
    data: Any = getattr(task, "dataset", None)
    if not hasattr(data, "items"):
        return None
    key: dict[str, Any] = {
        "versions": [_FORMAT, version("lm_eval"), version("datasets")],
        "task": task.dump_config(),
        "seed": getattr(task, "fewshot_seed", None),
        "data": {str(split): getattr(rows, "_fingerprint", None) for split, rows in data.items()},
        "limit": limit,
    }
    if None in key["data"].values():
        return None
    name = hashlib.sha256(json.dumps(key, default=str, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"{name[:32]}.pickle"


def _read(path: Path) -> list[Any] | None:
    """What is kept there; nothing where there is no file, or one that cannot be read."""
    try:
        requests = dill.loads(path.read_bytes())
    except Exception:  # a damaged pickle may raise anything, and can be made again
        return None
    return requests


def _write(path: Path, requests: list[Any]) -> None:
    """Keep requests; several processes may do so at the same time. A full disk costs no more than the next building."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, dill.dumps(requests))
    except OSError:
        path.unlink(missing_ok=True)

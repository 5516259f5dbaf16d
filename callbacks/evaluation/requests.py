"""The requests of a task, built once: what takes seconds to build is kept on the disk, under versions and data."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dill
import lm_eval.utils
from lm_eval.evaluator_utils import get_sample_size

from callbacks.evaluation.tasks import seed_everything
from modules.files import replace_file

WORTH_KEEPING_S = 2.0
"""Building what a name stands for takes less for most tasks, and more for MMLU."""
KEPT_FOR_S = 30 * 24 * 3600
"""What nobody has read for so long is deleted when something new is kept."""
_FORMAT = 1


def cache_folder() -> Path:
    """Where built requests are kept: LM_HARNESS_CACHE_PATH, as for lm-eval's own, or below the user's cache."""
    own = os.environ.get("LM_HARNESS_CACHE_PATH")
    if own:
        return Path(own) / "growmoe"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "growmoe" / "requests"


@contextmanager
def built_requests(tasks: Mapping[str, Any], limit: int | float | None) -> Iterator[dict[str, list[Any]]]:
    """Give tasks their requests, and keep lm-eval from building them again; afterwards they have none.

    (Those of MMLU hold 250 MB of prompts.) lm-eval's own cache knows a task by its name and shots alone, and builds all
    of them where a few are asked for.

    Args:
        tasks: with their data, their shots and their seeds.
        limit: documents per task at most; below 1, a share of them.
    """
    places = {name: _place_of(task, limit) for name, task in tasks.items()}
    requests = {name: _read(place) for name, place in places.items()}
    missing = [name for name, found in requests.items() if found is None]
    began = time.perf_counter()
    for name in missing:
        seed_everything()  # for each: what a task asks does not depend on which others were built
        tasks[name].build_all_requests(limit=get_sample_size(tasks[name], limit), rank=0, world_size=1)
        requests[name] = tasks[name].instances
    if time.perf_counter() - began > WORTH_KEEPING_S:
        for name in missing:
            _write(places[name], requests[name])
    for name, task in tasks.items():
        task._instances = requests[name]
        task.build_all_requests = _nothing
    try:
        yield {name: task.instances for name, task in tasks.items()}
    finally:
        for task in tasks.values():
            del task.build_all_requests
            task._instances = None


@contextmanager
def templates_compiled_once() -> Iterator[None]:
    """Let lm-eval keep the templates of tasks: it compiles them anew for each document, in 1 ms or more, which for MMLU
    with shots is most of a minute."""
    environment: Any = lm_eval.utils.env
    environment.from_string = lru_cache(maxsize=None)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string


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


def _nothing(**settings: Any) -> None:
    """In the place of building requests that are there."""


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
    text = json.dumps(key, default=str, sort_keys=True)
    if " at 0x" in text:  # a part of the definition that has no name but its place in memory
        return None
    name = hashlib.sha256(text.encode()).hexdigest()
    return cache_folder() / f"{name[:32]}.pickle"


def _read(path: Path | None) -> list[Any] | None:
    """What is kept there; nothing where there is no file, or one that cannot be read."""
    try:
        if path is None:
            return None
        os.utime(path)
        return dill.loads(path.read_bytes())
    except Exception:  # a damaged pickle may raise anything, and can be made again
        return None


def _write(path: Path | None, requests: list[Any] | None) -> None:
    """Keep requests; several processes may do so at the same time. A full disk costs no more than the next building."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob("*.pickle"):
            if time.time() - other.stat().st_mtime > KEPT_FOR_S:
                other.unlink(missing_ok=True)
        replace_file(path, dill.dumps(requests))
    except OSError:
        path.unlink(missing_ok=True)

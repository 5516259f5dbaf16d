"""Loading lm-eval tasks with their data sets, from the hub or a local mirror; what is wrong shows here, in one line.

lm-eval and datasets are imported when tasks are loaded, not with this file: the import takes seconds.
"""

import difflib
import hashlib
import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from callbacks.evaluation.suites import Suite, embedded_tasks, suite_names
from modules.errors import InputError

Missing = Literal["error", "skip"]
FEWSHOT_ANSWERS: dict[str, Callable[[dict[str, Any]], str]] = {"webqs": lambda doc: doc["answers"][0]}
"""What shots of a task answer, where lm-eval 0.4.13 fails to say: its lists of right choices are no text."""
MIRROR_MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Source:
    """Where the data of tasks come from.

    Attributes:
        folder: task YAMLs beside lm-eval's own.
        mirror: a folder with data sets of the hub, `<org>/<name>`; then nothing is asked of the hub.
        missing: what to do about tasks whose data are not at hand: end with their names, or go on without them.
    """

    folder: Path | None = None
    mirror: Path | None = None
    missing: Missing = "error"

    @property
    def mirror_hash(self) -> str | None:
        """That of the mirror's list of contents, where it has one."""
        manifest = None if self.mirror is None else self.mirror / MIRROR_MANIFEST
        return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest and manifest.is_file() else None


@dataclass(frozen=True)
class LoadedTasks:
    """A suite's tasks.

    Attributes:
        suite: whose.
        by_name: for each of the suite's names, in order, what lm-eval's `TaskManager.load` returns: tasks, groups,
            group_map.
        missing: the names that are left out, and why.
        mirror_hash: as in `Source`.
    """

    suite: Suite
    by_name: dict[str, dict[str, Any]]
    missing: dict[str, str] = field(default_factory=dict)
    mirror_hash: str | None = None


def check_limit(limit: int | float | None) -> None:
    """Raise `InputError` for a limit that leaves nothing to evaluate."""
    if limit is not None and not limit > 0:
        raise InputError(f"limit={limit} must be above 0 documents; leave it out to evaluate all")


def load_tasks(suite: Suite, source: Source = Source()) -> LoadedTasks:
    """Load a suite's tasks with their data sets; random state is left as it was found.

    lm-eval's whole registry, which takes seconds to read, is opened only for names that neither the source's folder nor
    the suite's own list of folders holds.

    Raises:
        InputError: a name that nobody knows; data sets that are not at hand (all of them are named), unless they are to
            be left out and others are there.
    """
    if source.mirror is not None and not source.mirror.is_dir():
        raise InputError(f"data_mirror={source.mirror} is no folder; give one that holds data sets as <org>/<name>")
    by_name: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    with preserved_random_state(), quiet_harness():
        managers = _task_managers(suite, source.folder)
        is_offline = False
        for name in suite.tasks:
            seed_everything()  # for each: a task's data do not depend on which tasks came before it
            manager = next(manager for manager in managers if name in manager.task_index)
            is_own = manager is managers[0]
            place = _dataset_cache(source.folder) if is_own else _data_of(source.mirror, is_offline)
            try:
                with place:
                    by_name[name] = manager.load([name])
            except Exception as error:  # in many ways: no network, no such file, a package that is not installed
                missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                is_offline |= isinstance(error, ConnectionError)
        for name, entry in by_name.items():
            for task_name, task in entry["tasks"].items():
                _set_shots(task, suite.num_fewshot.get(name))
                if task_name in FEWSHOT_ANSWERS:
                    task.fewshot_cfg.doc_to_target = FEWSHOT_ANSWERS[task_name]
    if missing and (source.missing == "error" or not by_name):
        raise InputError(_describe_missing(missing, source))
    return LoadedTasks(suite, by_name, missing, source.mirror_hash)


def _set_shots(task: Any, shots: int | None) -> None:
    """The suite's shots, else the task's own, else none."""
    if shots is not None:
        task.set_config("num_fewshot", shots)
    elif task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)


def _describe_missing(missing: dict[str, str], source: Source) -> str:
    name, reason = next(iter(missing.items()))
    names = ", ".join(missing)
    where = "the hub" if source.mirror is None else f"data_mirror={source.mirror}"
    fix = "add them to the mirror" if source.mirror else "a network, a filled Hugging Face cache, or data_mirror"
    return (
        f"evaluation tasks cannot be loaded from {where}: {names} ({name}: {reason}); make their data available "
        f"({fix}), leave these tasks out, or set missing=skip to go on with the others"
    )


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Python's, NumPy's and torch's global random states leave the block as they entered it, also after an error."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def seed_everything() -> None:
    """Set the seeds of lm-eval's own `simple_evaluate`: some tasks shuffle with global randomness."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    # not torch.manual_seed: it queues a seed for a CUDA device that is not started yet, which nothing could take back
    torch.default_generator.manual_seed(DEFAULT_OTHER_SEED)


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep progress bars and log lines below errors of lm-eval and datasets off the terminal."""
    import datasets
    import lm_eval.api.task

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars_were_on = not datasets.are_progress_bars_disabled()
    progress_bar = lm_eval.api.task.tqdm  # lm-eval offers no switch for the bar of build_all_requests
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        lm_eval.api.task.tqdm = partial(progress_bar, disable=True)
        yield
    finally:
        lm_eval.api.task.tqdm = progress_bar
        if bars_were_on:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _task_managers(suite: Suite, folder: Path | None) -> list[Any]:
    """What the source's folder holds, then the suite's folders of lm-eval, then, for names in neither, all of lm-eval.
    Every name is in one of them."""
    import lm_eval.tasks

    folders = [] if folder is None else [os.fspath(folder)]
    managers = [lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)]
    root = Path(lm_eval.tasks.__file__).parent
    near = [os.fspath(root / name) for name in suite.folders if (root / name).is_dir()]

    def unknown() -> list[str]:
        return [name for name in suite.tasks if not any(name in manager.task_index for manager in managers)]

    if unknown() and near:
        managers.append(lm_eval.tasks.TaskManager(include_defaults=False, include_path=near))
    if unknown():
        managers.append(lm_eval.tasks.TaskManager(include_defaults=True, include_path=folders))
    for name in unknown():
        known = managers[-1].all_tasks
        close = difflib.get_close_matches(name, [*embedded_tasks(), *known], n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "list the names with: lm-eval ls tasks"
        raise InputError(
            f"evaluation task {name!r} is neither a suite ({', '.join(suite_names())}) nor among the {len(known)} "
            f"tasks known to lm-eval; {hint}"
        )
    return managers


@contextmanager
def _data_of(mirror: Path | None, is_offline: bool) -> Iterator[None]:
    """Data sets come from a mirror: `datasets` prefers a folder `<org>/<name>` of the working directory to the hub.

    Without one the hub is asked; once it could not be reached, which takes it half a minute to find out, only the
    user's cache is.
    """
    import datasets
    from huggingface_hub import constants

    if mirror is None and not is_offline:
        yield
        return
    homes: tuple[Any, ...] = (datasets.config, constants)
    former = [home.HF_HUB_OFFLINE for home in homes]
    try:
        for home in homes:
            home.HF_HUB_OFFLINE = True
        with nullcontext() if mirror is None else chdir(mirror):
            yield
    finally:
        for home, value in zip(homes, former, strict=True):
            home.HF_HUB_OFFLINE = value


@contextmanager
def _dataset_cache(folder: Path | None) -> Iterator[None]:
    """Let data sets of a task folder keep their Arrow copies inside it, not in the user's cache: they go with it."""
    import datasets

    former = datasets.config.HF_DATASETS_CACHE
    if folder is not None and os.access(folder, os.W_OK):
        datasets.config.HF_DATASETS_CACHE = Path(folder) / ".datasets"
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = former

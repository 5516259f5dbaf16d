"""Which tasks an evaluation runs: suites from YAML files, and lm-eval tasks by name with errors that say what to do.

lm-eval and datasets are imported when tasks are loaded, not with this file: the import takes seconds.
"""

import difflib
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from modules.errors import InputError

SUITE_FOLDER = Path(__file__).resolve().parent.parent / "configs" / "eval"


@dataclass(frozen=True)
class Suite:
    """A named list of evaluation tasks."""

    name: str
    tasks: tuple[str, ...]
    """names of lm-eval tasks, groups or tags"""
    num_fewshot: Mapping[str, int] = field(default_factory=dict)
    """shots by task; a task that is not named here takes what its own YAML says, else 0"""
    description: str = ""
    embedded: bool = False
    """the tasks belong to the embedded world: their folder comes with its data, not with lm-eval"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise InputError(
                f"evaluation suite {self.name!r} has the tasks {list(self.tasks)}; it needs at least one, and each once"
                ": correct the list of tasks"
            )
        strangers = sorted(set(self.num_fewshot) - set(self.tasks))
        if strangers:
            raise InputError(
                f"num_fewshot of evaluation suite {self.name!r} names {strangers[0]!r}, which is not among its tasks "
                f"{list(self.tasks)}; name one of them"
            )
        for task, shots in self.num_fewshot.items():
            if not isinstance(shots, int) or shots < 0:
                raise InputError(
                    f"num_fewshot of {task!r} is {shots!r}; it must be a whole number of at least 0: change it"
                )


def suite_names() -> list[str]:
    """The suites that `configs/eval` holds."""
    return sorted(path.stem for path in SUITE_FOLDER.glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """Read `configs/eval/<name>.yaml`. Raises InputError for a name or a file that is no suite."""
    if name not in suite_names():
        raise InputError(f"no evaluation suite is called {name!r}; choose one of {', '.join(suite_names())}")
    path = SUITE_FOLDER / f"{name}.yaml"
    record = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return Suite(**record)
    except TypeError as error:
        raise InputError(
            f"{path} is not an evaluation suite ({error}); it holds name, tasks, num_fewshot, description and embedded"
        ) from error


def choose_suite(tasks: str | Sequence[str]) -> Suite:
    """The suite that the user means: the name of one, or the names of tasks (a list, or with commas between them)."""
    if isinstance(tasks, str):
        if tasks in suite_names():
            return load_suite(tasks)
        tasks = [task.strip() for task in tasks.split(",") if task.strip()]
    return Suite(name=",".join(tasks), tasks=tuple(tasks), embedded=not embedded_tasks().isdisjoint(tasks))


def embedded_tasks() -> set[str]:
    """The tasks that an embedded world brings with it."""
    suites = (load_suite(name) for name in suite_names())
    return {task for suite in suites if suite.embedded for task in suite.tasks}


def load_tasks(suite: Suite, include_path: Path | None = None) -> dict[str, dict[str, Any]]:
    """Load a suite's tasks with their data sets; random state is left as it was found.

    Args:
        suite: the tasks and their shots.
        include_path: a folder with task YAMLs. lm-eval's own registry, which takes seconds to read, is opened only for
            names that this folder lacks.

    Returns:
        For each of the suite's names, in order, what lm-eval's `TaskManager.load` returns: tasks, groups, group_map.

    Raises:
        InputError: a name that neither knows; a data set that cannot be loaded here.
    """
    with preserved_random_state(), quiet_harness():
        own, registry = _task_managers(suite, include_path)
        loaded = {}
        for name in suite.tasks:
            seed_everything()  # for each: a task's data do not depend on which tasks came before it
            is_own = name in own.task_index
            with _dataset_cache(include_path if is_own else None):
                loaded[name] = _load_task(own if is_own else registry, name)
    for name, entry in loaded.items():
        for task in entry["tasks"].values():
            if name in suite.num_fewshot:
                task.set_config("num_fewshot", suite.num_fewshot[name])
            elif task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
    return loaded


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


def _task_managers(suite: Suite, include_path: Path | None) -> tuple[Any, Any]:
    """What the folder holds, and lm-eval's registry if a name is not in the folder; every name is in one of them."""
    from lm_eval.tasks import TaskManager

    folders = [] if include_path is None else [os.fspath(include_path)]
    own = TaskManager(include_defaults=False, include_path=folders)
    if all(name in own.task_index for name in suite.tasks):
        return own, own
    registry = TaskManager(include_defaults=True, include_path=folders)
    for name in suite.tasks:
        if name not in registry.task_index:
            near = difflib.get_close_matches(name, [*embedded_tasks(), *registry.all_tasks], n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "list the names with: lm-eval ls tasks"
            raise InputError(
                f"evaluation task {name!r} is neither a suite ({', '.join(suite_names())}) nor among the "
                f"{len(registry.all_tasks)} tasks known to lm-eval; {hint}"
            )
    return own, registry


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


def _load_task(manager: Any, name: str) -> dict[str, Any]:
    try:
        return manager.load([name])
    except Exception as error:  # data sets fail in many ways: no network, no such file, a package that is not installed
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"evaluation task {name!r} cannot be loaded ({reason}); make its data set available "
            "(a network, or a filled Hugging Face cache with HF_HUB_OFFLINE=1), or leave this task out"
        ) from error

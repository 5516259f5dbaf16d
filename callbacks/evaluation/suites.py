"""Suites: named lists of evaluation tasks with their shots, from `configs/eval/*.yaml`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from modules.errors import InputError

SUITE_FOLDER = Path(__file__).resolve().parents[2] / "configs" / "eval"


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
    folders: tuple[str, ...] = ()
    """where lm-eval keeps the tasks; for others its whole registry is read, which takes seconds"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "folders", tuple(self.folders))
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
    known = {each.name for each in fields(Suite)} | {"include"}
    if not isinstance(record, dict) or not set(record) <= known:
        strange = sorted(set(record) - known) if isinstance(record, dict) else record
        raise InputError(f"{path} is not an evaluation suite: it has {strange}; known are {', '.join(sorted(known))}")
    included = [load_suite(other) for other in record.pop("include", [])]
    if not included:
        return Suite(**{"tasks": (), **record})
    own_shots = {} if record.get("tasks") else record.pop("num_fewshot", {})
    joined = join_suites(included, **{"name": name, **record})
    return replace(joined, num_fewshot={**joined.num_fewshot, **own_shots})


def load_suites(names: str) -> Suite:
    """One suite, or several with commas between them, as one. Raises InputError for a name that is none."""
    listed = [name.strip() for name in names.split(",")]
    suites = [load_suite(name) for name in listed]
    return suites[0] if len(suites) == 1 else join_suites(suites, name=names)


def join_suites(suites: Sequence[Suite], **own: Any) -> Suite:
    """The tasks of several suites, and those of one's own behind them; a task that several have comes once."""
    parts = [*suites, *([Suite(**own)] if own.get("tasks") else [])]
    tasks = dict.fromkeys(task for part in parts for task in part.tasks)
    shots = {task: number for part in parts for task, number in part.num_fewshot.items()}
    embedded = any(part.embedded for part in parts)
    folders = dict.fromkeys(folder for part in parts for folder in part.folders)
    return Suite(own["name"], tuple(tasks), shots, own.get("description", ""), embedded, tuple(folders))


def choose_suite(tasks: str | Sequence[str]) -> Suite:
    """What the user means: names of suites and of lm-eval tasks, in a list or with commas between them."""
    names = tasks.split(",") if isinstance(tasks, str) else tasks
    names = [name.strip() for name in names if name.strip()]
    if len(names) == 1 and names[0] in suite_names():
        return load_suite(names[0])
    known = suite_names()
    parts = [load_suite(name) if name in known else _single(name) for name in dict.fromkeys(names)]
    return join_suites(parts, name=",".join(names))


def _single(name: str) -> Suite:
    return Suite(name, (name,), embedded=name in embedded_tasks())


def embedded_tasks() -> set[str]:
    """The tasks that an embedded world brings with it."""
    suites = (load_suite(name) for name in suite_names())
    return {task for suite in suites if suite.embedded for task in suite.tasks}

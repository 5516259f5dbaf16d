"""What a study compares: sizes, arms, seeds, and what each run is given."""

import re
from collections import UserDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from jsonargparse.typing import register_type

from modules.errors import InputError, require_not_negative, require_positive
from modules.functional.budget import TOKENS_PER_PARAMETER, Mode

Keep = Literal["all", "last", "none"]


class Options(UserDict[str, Any]):
    """Options of `growmoe fit`, as in its YAML files. No dict: jsonargparse would make instances of what is in one."""


register_type(Options, serializer=dict, deserializer=Options)

SET_BY_STUDY = ("seed_everything", "ckpt_path", "trainer.max_steps", "trainer.default_root_dir", "data.init_args.seed")
"""Options that a study sets itself for every run."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")


@dataclass(frozen=True)
class ArmOptions:
    """One kind of model, at every size or at some."""

    options: Options = field(default_factory=Options)
    """options of fit, laid over those of the size"""
    sizes: dict[str, Options] | None = None
    """options for single sizes, laid over the others; the arm then exists at these sizes alone"""


@dataclass(frozen=True)
class StudyBudget:
    """How long each run is. Everything follows from the anchor's runs, one for each size."""

    tokens_per_parameter: float = TOKENS_PER_PARAMETER
    """of the anchor, whose parameters without embeddings count"""
    accelerator_seconds: float | dict[str, float] | None = None
    """instead of that: what every run may take, of all devices together; one number, or one for each size"""
    modes: list[Mode] = field(default_factory=lambda: ["step_time"])
    """what the runs of a size have in common with the anchor's: step_time, their accelerator time; tokens; flops, of
    training; own_chinchilla: nothing, each trains on so many tokens for each of its own active parameters"""

    def __post_init__(self) -> None:
        require_positive(**{"budget.tokens_per_parameter": float(self.tokens_per_parameter)})
        given = self.accelerator_seconds
        for name, value in (given if isinstance(given, dict) else {"": given}).items():
            if value is not None:
                require_positive(**{f"budget.accelerator_seconds{'.' if name else ''}{name}": float(value)})
        if not self.modes or len(set(self.modes)) != len(self.modes):
            raise InputError(f"budget.modes={self.modes} must name at least one mode, each once; step_time is usual")

    def seconds_of(self, size: str) -> float | None:
        """Accelerator time of a run of a size, where it does not follow from parameters.

        Raises:
            InputError: there is none for this size, and there are some for others.
        """
        given = self.accelerator_seconds
        if isinstance(given, dict) and size not in given:
            raise InputError(f"budget.accelerator_seconds has no entry for the size {size}; give one for each size")
        return given[size] if isinstance(given, dict) else given


@dataclass(frozen=True)
class Measuring:
    """How step times are measured: all arms in turn, several rounds, each in a process of its own."""

    rounds: int = 3
    """of all arms; a step's time is the median over the steps of all rounds"""
    warmup: int = 5
    """steps that are not timed"""
    steps: int = 10
    """that are timed"""
    parts: int = 2
    """steps behind them, of the first round, that are taken apart"""

    def __post_init__(self) -> None:
        require_positive(**{"measure.rounds": self.rounds, "measure.steps": self.steps})
        require_not_negative(**{"measure.warmup": self.warmup, "measure.parts": self.parts})


@dataclass(frozen=True)
class Arm:
    """A model of a size, with all options of its runs."""

    size: str
    name: str
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Unique in the study; a name for files."""
        return f"{self.size}-{self.name}"

    def configuration(
        self, seed: int | None = None, run_dir: str | None = None, steps: int | None = None
    ) -> dict[str, Any]:
        """What `growmoe fit` is given; without steps, what `growmoe measure` is."""
        layers: list[Mapping[str, Any]] = [{"wandb": {"mode": "disabled"}}, self.options]
        if seed is not None:
            layers.append({"seed_everything": seed, "data": {"init_args": {"seed": seed}}})
        if steps is not None:
            layers.append({"trainer": {"max_steps": steps, "default_root_dir": run_dir}})
        return merged(*layers)


def make_arms(common: Options, sizes: Mapping[str, Options], arms: Mapping[str, ArmOptions], anchor: str) -> list[Arm]:
    """Every arm at every size that it has, sizes in their order, the anchor of a size before its other arms.

    Raises:
        InputError: names that cannot be folders; an anchor that is missing at a size; options that the study sets.
    """
    if not sizes or not arms:
        raise InputError(
            f"a study of {len(sizes)} sizes and {len(arms)} arms compares nothing; give at least one of each"
        )
    for name in (*sizes, *arms):
        if not _NAME.fullmatch(name):
            raise InputError(f"the name {name!r} cannot be a folder's; use letters, digits and _")
    if anchor not in arms:
        raise InputError(f"anchor={anchor} is none of the arms {', '.join(arms)}; name the dense arm")
    for name, arm in arms.items():
        unknown = set(arm.sizes or ()) - set(sizes)
        if unknown:
            raise InputError(f"arms.{name}.sizes names {min(unknown)}, which is none of the sizes {', '.join(sizes)}")
        if name == anchor and arm.sizes is not None and set(arm.sizes) != set(sizes):
            missing = next(size for size in sizes if size not in arm.sizes)
            raise InputError(
                f"the anchor {anchor} has no size {missing}, and every size needs one; give it, or leave sizes out"
            )
    ordered = [anchor, *(name for name in arms if name != anchor)]
    made = list(_combine(common, sizes, {name: arms[name] for name in ordered}))
    for each in made:
        _refuse_set(each)
    return made


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Options laid over each other, later ones over earlier ones, key by key."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, Mapping):
                former = result.get(key)
                value = merged(former if isinstance(former, Mapping) else {}, value)
            result[key] = value
    return result


def option(options: Mapping[str, Any], path: str) -> Any:
    """The value under a path such as `trainer.max_steps`; None where there is none."""
    value: Any = options
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def to_yaml(options: Mapping[str, Any]) -> str:
    """As a configuration file."""
    return yaml.safe_dump(merged(options), sort_keys=False, allow_unicode=True)


def _combine(common: Options, sizes: Mapping[str, Options], arms: Mapping[str, ArmOptions]) -> Iterator[Arm]:
    for size, of_size in sizes.items():
        for name, arm in arms.items():
            if arm.sizes is None or size in arm.sizes:
                yield Arm(size, name, merged(common, of_size, arm.options, (arm.sizes or {}).get(size) or {}))


def _refuse_set(arm: Arm) -> None:
    for path in SET_BY_STUDY:
        value = option(arm.options, path)
        if value is not None:
            raise InputError(f"{path}={value} of {arm.key} is set by the study itself for every run; leave it out")
    stages = option(arm.options, "growth.stages") or []
    if any(option(stage, "at_plateau") for stage in stages):
        raise InputError(
            f"growth of {arm.key} waits for a plateau, and its budget must be known before; give at_fraction"
        )

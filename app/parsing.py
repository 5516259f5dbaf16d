"""Option parsing whose errors are one line: where, what is wrong, and what was probably meant."""

import inspect
import re
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from modules.errors import InputError, find_input_error

_NOISE = re.compile(
    r"^Parser key|Expected a <class 'NoneType'>|^Given value|^Errors:$|^Subtypes:|Does not validate against"
    r"|^Problem with given|Expected a path but"
)
_KEY = re.compile(r'Parser key "([^"]+)"')
_UNKNOWN = re.compile(r"unrecognized arguments: -*([\w.]+)|option '([\w.]+)'", re.IGNORECASE)


class OneLineParser(ArgumentParser):
    """A jsonargparse parser that reports an error as one line and exits with 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the innermost reason, without usage and traceback."""
        reason = find_input_error(ex)
        line = str(reason) if reason else _innermost_reason(message) + self._suggestion(message)
        line = _KEY.sub(r"\1", line)
        sys.stderr.write(f"growmoe: {' '.join(line.split())}\n")
        sys.exit(2)

    def _suggestion(self, message: str) -> str:
        """The known name that is nearest to an unknown one."""
        match = _UNKNOWN.search(message)
        if match is None:
            return ""
        known = {action.dest.split(".")[-1] for action in self._actions} | set(_nested_names())
        parts = (match[1] or match[2]).split(".")
        unknown = next((part for part in parts if part not in known), parts[-1])
        near = get_close_matches(unknown, sorted(known), n=1, cutoff=0.5)
        return f"; did you mean {near[0]}?" if near else ""


def layered_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Options of YAML files (`-c FILE`, any number of them), and over these those of the command line
    (`--name.part VALUE`, or alone for true); mappings are merged key by key.

    Raises:
        InputError: a file that cannot be read; words that are no option.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    layers, flags = [], []
    words = deque(arguments)
    try:
        while words:
            name, is_joined, value = words.popleft().partition("=")
            if not re.match(r"--?[a-zA-Z]", name):
                raise InputError(f"{name!r} is no option; write -c FILE, or --name VALUE")
            if not is_joined:
                value = words.popleft() if words and not re.match(r"--?[a-zA-Z]", words[0]) else "true"
            if name in ("-c", "--config"):
                layers.append(OmegaConf.load(value))
            else:
                flags.append(f"{name.lstrip('-')}={value}")
        merged = OmegaConf.merge(*layers, OmegaConf.from_dotlist(flags))
        found = OmegaConf.to_container(merged, resolve=True)
    except (OSError, UnicodeDecodeError, YAMLError, TypeError, OmegaConfBaseException) as error:
        raise InputError(f"the configuration cannot be read: {error}") from None
    assert isinstance(found, dict)
    return {str(name): value for name, value in found.items()}


def _nested_names() -> Iterator[str]:
    """Names inside the classes of model, data and growth, which are no options of a parser itself."""
    from datamodules import BilingualText, SyntheticWorld, TextDataModule
    from modules.config import ModelConfig
    from modules.functional.schedule import ScheduleConfig
    from modules.growth.stage import GrowthStage, GrowthTarget
    from modules.moe_config import CapacityConfig, MoEConfig, RouterConfig
    from modules.optim import OptimizerConfig

    shapes = (ModelConfig, MoEConfig, RouterConfig, CapacityConfig)
    for config in (*shapes, OptimizerConfig, ScheduleConfig, GrowthStage, GrowthTarget):
        yield from (field.name for field in fields(config))
    for data in (TextDataModule, BilingualText, SyntheticWorld):
        yield from inspect.signature(data).parameters


def _innermost_reason(message: str) -> str:
    """The most telling line of jsonargparse's report over all members of a union, with the key it is about."""
    lines = [line.strip().removeprefix("- ").strip() for line in message.splitlines()]
    telling = [line for line in lines if line and not _NOISE.search(line)]
    keys = _KEY.findall(message)
    where = f"{keys[-1]}: " if keys and telling else ""
    return where + (telling[-1] if telling else message)

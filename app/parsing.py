"""Option parsing whose errors are one line: what is wrong, and what was probably meant."""

import re
import sys
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from modules.errors import find_input_error

_NOISE = re.compile(r"Expected a <class 'NoneType'>|Given value|^Errors:$|^Does not validate|^Problem with given|^- ?$")


class OneLineParser(ArgumentParser):
    """A jsonargparse parser that reports an error as one line and exits with 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the innermost reason, without usage and traceback."""
        reason = find_input_error(ex)
        line = str(reason) if reason else _first_reason(message)
        sys.stderr.write(f"{self.prog}: {' '.join(line.split())}{self._suggestion(line)}\n")
        sys.exit(2)

    def _suggestion(self, line: str) -> str:
        match = re.search(r"(?:[Uu]nrecognized arguments?:|Key) *'?-*([\w.]+)", line)
        if match is None:
            return ""
        known = sorted({action.dest for action in self._actions} | set(_nested_names(self)))
        near = get_close_matches(match[1], known, n=1, cutoff=0.6)
        return f"; did you mean {near[0]}?" if near else ""


def _nested_names(parser: Any) -> list[str]:
    """Names inside the model's and the data's classes, which are no options of the parser itself."""
    from dataclasses import fields

    from modules.config import ModelConfig, MoEConfig

    model = [f"architecture.{field.name}" for field in fields(ModelConfig)]
    moe = [f"architecture.moe.{field.name}" for field in fields(MoEConfig)]
    return model + moe


def _first_reason(message: str) -> str:
    """The most telling lines of jsonargparse's report over all members of a union."""
    lines = [line.strip().removeprefix("- ").strip() for line in message.splitlines()]
    telling = [line for line in lines if line and not _NOISE.search(line)]
    return telling[-1] if len(telling) > 1 else (telling or [message])[0]

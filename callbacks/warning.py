"""Warnings that a person reads: one line, from the first process, without the line of code that gave them."""

from lightning.pytorch.utilities import rank_zero_warn

_NO_SOURCE = 1_000_000
"""stack level above every frame: Python then shows no source"""


def warn(text: str) -> None:
    """Warn, and go on."""
    rank_zero_warn(text, stacklevel=_NO_SOURCE)

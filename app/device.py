"""Which device a command runs its model on."""

from typing import TYPE_CHECKING

from modules.errors import InputError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> "torch.device":
    """The torch device of that name; `auto` is a GPU if there is one. Raises InputError for one that is not here."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except Exception as error:  # torch raises several kinds, depending on what is missing
        reason = str(error).splitlines()[0]
        raise InputError(f"device={name!r} cannot be used here ({reason}); use cpu, or leave it out") from None
    return torch.device(name)

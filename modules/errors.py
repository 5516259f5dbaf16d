"""The one exception that means: what the user gave is wrong; and the two checks that raise it most."""

import math


class InputError(ValueError):
    """The user's input is wrong.

    The message is one line with four parts: what, the value, the limit, the fix. The command line prints it without a
    traceback and ends with exit code 2; nothing has been written or overwritten by then.
    """


def find_input_error(error: BaseException | None) -> InputError | None:
    """The `InputError` that an exception is or follows from, if any: libraries wrap what they catch."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, InputError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def require_positive(**values: int | float) -> None:
    """Raise `InputError` for the first value below 1 (integers) or not above 0 (floats)."""
    for name, value in values.items():
        if isinstance(value, int) and value < 1:
            raise InputError(f"{name}={value} must be at least 1; give a positive number")
        if not value > 0 or not math.isfinite(value):
            raise InputError(f"{name}={value} must be a finite number above 0; give a positive number")


def require_not_negative(**values: int | float) -> None:
    """Raise `InputError` for the first value that is negative or not finite."""
    for name, value in values.items():
        if not (value >= 0 and math.isfinite(value)):
            raise InputError(f"{name}={value} must be a finite number of at least 0; use 0 to switch it off")

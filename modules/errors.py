"""The one exception that means: what the user gave is wrong."""


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

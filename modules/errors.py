"""The one exception that means: what the user gave is wrong."""


class InputError(ValueError):
    """The user's input is wrong.

    The message is one line with four parts: what, the value, the limit, the fix. The command line prints it without a
    traceback and ends with exit code 2; nothing has been written or overwritten by then.
    """

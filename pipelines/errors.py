"""The mistakes a user can make in a run: each is one sentence that says what was given, what is needed and how to fix it.

The command line prints a `UserError` without a traceback and ends with exit code 2.
"""


class UserError(ValueError):
    """Input that cannot be run as it stands: a config, a path, a value, a folder, a missing file."""


class Interrupted(Exception):
    """The run was stopped by the user; the message says what is kept and which command goes on from there."""

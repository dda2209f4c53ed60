"""Errors that are the user's to mend: the command line prints them without a traceback and exits with 2."""

from collections.abc import Sequence


class UserError(Exception):
    """Something the user asked for cannot be done; the message says what, with the numbers, and the fix."""


class ConfigError(UserError):
    """A configuration that cannot run.

    Args:
        problems: every problem found, one sentence each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))

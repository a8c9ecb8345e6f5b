"""Errors that the user can put right: the program shows them as one line, without a traceback."""

from pathlib import Path


class UserError(Exception):
    """A wrong option, or a file that is missing or broken."""


def data_error(path: Path, expected: str, found: object) -> UserError:
    """What a file should have been, and what it is."""
    return UserError(f"{path}: expected {expected}, found {found}.")


class DivergedError(UserError):
    """A loss that is no number."""

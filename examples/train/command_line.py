"""Options from the command line: every setting by its name, or by its path."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from examples.train import optimizers, tasks
from examples.train.config import Config, full_path, settings
from examples.train.errors import UserError


class Parser(argparse.ArgumentParser):
    """Says what is wrong with an option in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message[0].lower() + message[1:] + ("" if message.endswith(".") else "."))


def add_settings(parser: argparse.ArgumentParser, but: Sequence[str] = ()) -> None:
    """An option for each setting, in groups."""
    groups: dict[str, Any] = {}
    for path, default, about in settings(Config()):
        group, _, name = path.rpartition(".")
        if name in but:
            continue
        if group not in groups:
            groups[group] = parser.add_argument_group(group or "run")
        flags = [f"--{name.replace('_', '-')}", *([f"--{path.replace('_', '-')}"] if group else [])]
        kind: dict[str, Any] = {"nargs": "?", "const": "true"} if isinstance(default, bool) else {}
        about = about.replace("%", "%%") + (f" (default {default})" if default != "" else "")
        groups[group].add_argument(flags[0], *flags[1:], dest=path, metavar="X", help=about, **kind)


def changes(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, dict[str, str]]:
    """All options, and the settings among them that were given."""
    options, rest = parser.parse_known_args(arguments)
    for word in rest:
        if word.startswith("--"):
            full_path(word[2:].partition("=")[0])  # says which name is meant
        raise UserError(f"unexpected argument {word!r}.")
    paths = [path for path, _, _ in settings(Config())]
    given = {name: value for name, value in vars(options).items() if name in paths and value is not None}
    return options, {path.rpartition(".")[2]: value for path, value in given.items()}


def lists() -> str:
    """The tasks and optimizers, for --help."""
    known = "".join(f"  {name:20} {task.about}\n" for name, task in tasks.TASKS.items())
    return f"tasks:\n{known}\noptimizers:\n  {', '.join(optimizers.OPTIMIZERS)}\n"


def fail(error: UserError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

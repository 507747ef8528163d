"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

_NEGATIVE = re.compile(r"-\.?\d.*")


LARGEST = 2**62
"""No number that is given may be larger: the database adds to some, and has 63 bits."""


class WholeNumber(click.IntRange):
    """A whole number within bounds, called so in messages."""

    name = "whole number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it; what the database could not hold is refused, though help says nothing of that."""
        number: int = super().convert(value, param, ctx)
        if number > LARGEST:
            self.fail(f"{number} is too large.", param, ctx)
        return number


NUMBER = WholeNumber(1)
"""Of a row: a key, a budget, an invoice."""

COUNT = WholeNumber(0)
"""How many are left out of a list."""

PORT = WholeNumber(0, 65_535)
"""Of TCP; 0 is any that is free."""

PROJECT_CHARS_MAX = 64
REFERENCE_CHARS_MAX = 100
"""A reference is part of a ledger entry's source, beside the account or the entry that it is for."""

DEFAULT_DATA_DIR = Path(".piecework")


class NumbersCommand(click.Command):
    """A command whose arguments are numbers: a negative one is refused as such, not as an unknown option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments; a space before it keeps a negative number from being read as an option."""
        try:
            return super().parse_args(ctx, [*args])
        except click.NoSuchOption as error:
            if not any(_NEGATIVE.fullmatch(arg) and arg.startswith(error.option_name) for arg in args):
                raise
        return super().parse_args(ctx, [f" {arg}" if _NEGATIVE.fullmatch(arg) else arg for arg in args])


class NumbersGroup(click.Group):
    """A group of such commands."""

    command_class = NumbersCommand


def _absolute(_ctx: click.Context, _param: click.Parameter, value: Path) -> Path:
    return value.expanduser().absolute()


def data_dir_option(command: Command) -> Command:
    """`--data-dir`, absolute when it arrives."""
    return click.option(
        "--data-dir",
        type=click.Path(path_type=Path, file_okay=False),
        default=DEFAULT_DATA_DIR,
        envvar="PIECEWORK_DATA_DIR",
        show_default=True,
        show_envvar=True,
        callback=_absolute,
        help="Directory of the embedded service: database, objects, broker, logs.",
    )(command)


def account_option(command: Command) -> Command:
    """`--account`, of a command that is about one account; as the argument `account_name`."""
    return click.option("--account", "account_name", required=True, help="Account that it is for.")(command)


def project_option(help_text: str) -> Callable[[Command], Command]:
    """`--project`, as the argument `project_id`."""
    return click.option("--project", "project_id", callback=_at_most(PROJECT_CHARS_MAX), help=help_text)


def reference_option(help_text: str) -> Callable[[Command], Command]:
    """`--reference`, short enough for the ledger; an empty one, as of a variable that is not set, is refused."""
    check = _at_most(REFERENCE_CHARS_MAX)

    def check_reference(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        if value == "":
            raise click.BadParameter("it is empty: name one, or leave the option out.")
        return check(ctx, param, value)

    return click.option("--reference", callback=check_reference, help=help_text)


def _at_most(chars_max: int) -> Callable[[click.Context, click.Parameter, str | None], str | None]:
    def check(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
        if value is not None and len(value) > chars_max:
            raise click.BadParameter(f"{len(value)} characters are too long: use at most {chars_max}.")
        return value

    return check


def json_option(command: Command) -> Command:
    """`--json`, as the argument `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs instead of a table.")(command)

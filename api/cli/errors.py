"""What the command line refuses, and how errors of the parts below become one line.

click.ClickException
└── CliError        a command cannot go on; the message says what to change
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import click
from pydantic import ValidationError


class CliError(click.ClickException):
    """The command cannot go on; the message says what to change."""

    exit_code = 1


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Turn the errors that a person can mend into `CliError`; a bug keeps its traceback."""
    from billing.rate_card_file import RateCardError
    from storage.errors import StorageError
    from storage.settings import say_what_is_wrong

    try:
        yield
    except (StorageError, RateCardError) as error:
        raise CliError(str(error)) from error
    except ValidationError as error:
        raise CliError(say_what_is_wrong(error)) from error
    except OSError as error:
        raise CliError(_os_message(error)) from error


def _os_message(error: OSError) -> str:
    name = f"{error.filename}: " if error.filename else ""
    return f"{name}{error.strerror or error}"

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
    from storage.errors import StorageError

    try:
        yield
    except StorageError as error:
        raise CliError(str(error)) from error
    except ValidationError as error:
        raise CliError(_settings_message(error)) from error
    except OSError as error:
        raise CliError(_os_message(error)) from error


def _settings_message(error: ValidationError) -> str:
    problems = (f"PIECEWORK_{'_'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors())
    return "a setting is wrong: " + "; ".join(problems)


def _os_message(error: OSError) -> str:
    name = f"{error.filename}: " if error.filename else ""
    return f"{name}{error.strerror or error}"

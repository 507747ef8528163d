"""Amounts and moments, as a person writes them."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation

from api.cli.errors import CliError
from api.parameters import FIRST_YEAR, LAST_YEAR
from billing import money
from billing.money import AmountError

_AGO = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def parse_amount(text: str, what: str = "AMOUNT") -> int:
    """A positive amount as the database has it.

    Raises:
        CliError: it is none.
    """
    text = text.strip()
    try:
        units = money.to_units(Decimal(text))
    except InvalidOperation as error:
        raise CliError(f"{what} {text!r} is no amount of money: write e.g. 25 or 12.50") from error
    except AmountError as error:
        raise CliError(f"{what}: {error}") from error
    if units <= 0:
        raise CliError(f"{what} {text!r} must be more than 0")
    return units


def parse_moment(text: str, option: str, *, now: datetime) -> datetime:
    """A day, a moment, or a time ago; what has no time zone is UTC.

    Args:
        option: where it was written, for messages.

    Raises:
        CliError: none of these, or too far away to be reckoned with.
    """
    try:
        moment = _parsed(text, now)
    except OverflowError:
        moment = None
    except ValueError as error:
        raise CliError(
            f"{option} {text!r} is no time: write 2026-01-31, 2026-01-31T12:00:00, or 90m, 24h, 7d"
        ) from error
    if moment is None or not FIRST_YEAR <= moment.year <= LAST_YEAR:
        raise CliError(f"{option} {text!r} is too far away: name a time in the years {FIRST_YEAR} to {LAST_YEAR}")
    return moment


def _parsed(text: str, now: datetime) -> datetime:
    if match := _AGO.fullmatch(text):
        return now - timedelta(**{_UNITS[match[2]]: float(match[1])})
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)

"""Amounts of money: Decimal in code, an integer of `SCALE`-ths in the database, rounded in one place."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Context, Decimal, InvalidOperation
from typing import Any

from sqlalchemy import ColumnElement, func

SCALE_DIGITS = 12
SCALE = 10**SCALE_DIGITS
"""Units in one of the currency: a charge is exact to 10⁻¹²."""

UNITS_MAX = 2**63 - 1
"""The largest amount of one row, about 9.2 million of the currency; sums may be larger."""

_CENTS = {
    **dict.fromkeys(("BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "UYI"), 0),
    **dict.fromkeys(("VND", "VUV", "XAF", "XOF", "XPF"), 0),
    **dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3),
}  # ISO 4217: decimal places of a currency where they are not two

_UNIT = Decimal(1).scaleb(-SCALE_DIGITS)
_EXACT = Context(prec=60)  # Decimal's default of 28 digits would round large sums
_HALF = 10**9


class AmountError(ValueError):
    """An amount of money that cannot be; the message says why."""


def round_charge(amount: Decimal) -> Decimal:
    """The amount at the precision it is charged at; half-way cases go to the even digit.

    Raises:
        AmountError: not a number, infinite, or of more digits than are reckoned with.
    """
    if not amount.is_finite():
        raise AmountError(f"{amount} is no amount of money")
    try:
        return amount.quantize(_UNIT, rounding=ROUND_HALF_EVEN, context=_EXACT)
    except InvalidOperation as error:
        raise AmountError(f"{amount} is too large for an amount of money") from error


def cents_digits(currency: str) -> int:
    """Decimal places of the smallest coin of a currency."""
    return _CENTS.get(currency, 2)


def round_to_cents(units: int, currency: str) -> int:
    """Units rounded to the smallest coin of the currency; half-way cases go to the even one."""
    coin: int = 10 ** (SCALE_DIGITS - cents_digits(currency))
    whole, rest = divmod(units, coin)
    up = 2 * rest > coin or (2 * rest == coin and whole % 2 == 1)
    return (whole + up) * coin


def to_units(amount: Decimal) -> int:
    """The integer that stands for a rounded amount in the database.

    Raises:
        AmountError: not a number, or too large for a row.
    """
    units = int(round_charge(amount).scaleb(SCALE_DIGITS, context=_EXACT))
    if abs(units) > UNITS_MAX:
        raise AmountError(f"{plain(amount)} is too large: an amount may be at most {plain(from_units(UNITS_MAX))}")
    return units


def from_units(units: int) -> Decimal:
    """The amount that an integer of the database stands for."""
    return Decimal(units).scaleb(-SCALE_DIGITS, context=_EXACT)


def plain(amount: Decimal) -> str:
    """Digits without an exponent or needless zeros, e.g. `0.00123`."""
    text = f"{amount:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def in_coins(amount: Decimal, currency: str) -> str:
    """The amount with the currency, with all decimal places of its coins at least: `-0.50 USD`."""
    places = max(cents_digits(currency), -int(Decimal(plain(amount)).as_tuple().exponent))
    return f"{amount:.{places}f} {currency}"


def sum_columns(column: ColumnElement[int]) -> tuple[ColumnElement[Any], ColumnElement[Any]]:
    """A column of units summed in two halves, which do not overflow as their sum would; `sum_of` joins them.

    SQLite adds integers in 64 bits and refuses a sum that is larger.
    """
    return func.coalesce(func.sum(column // _HALF), 0), func.coalesce(func.sum(column % _HALF), 0)


def sum_of(high: Any, low: Any) -> int:
    """The sum in units, of what `sum_columns` has given."""
    return int(high) * _HALF + int(low)

"""Amounts of money: Decimal in code, an integer of `SCALE`-ths in the database, rounded in one place."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal

SCALE_DIGITS = 12
SCALE = 10**SCALE_DIGITS
"""Units in one of the currency: a charge is exact to 10⁻¹²."""

_UNIT = Decimal(1).scaleb(-SCALE_DIGITS)


def round_charge(amount: Decimal) -> Decimal:
    """The amount at the precision it is charged at; half-way cases go to the even digit.

    Raises:
        ValueError: not a number, or infinite.
    """
    if not amount.is_finite():
        raise ValueError(f"{amount} is no amount of money")
    return amount.quantize(_UNIT, rounding=ROUND_HALF_EVEN)


def to_units(amount: Decimal) -> int:
    """The integer that stands for a rounded amount in the database."""
    return int(round_charge(amount).scaleb(SCALE_DIGITS))


def from_units(units: int) -> Decimal:
    """The amount that an integer of the database stands for."""
    return Decimal(units).scaleb(-SCALE_DIGITS)


def plain(amount: Decimal) -> str:
    """Digits without an exponent or needless zeros, e.g. `0.00123`."""
    text = f"{amount:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text

"""Numbers and arrays within bounds, refused with the field's name."""

from __future__ import annotations

import math

import numpy as np

from jobs.operations import Array
from jobs.validation.errors import InvalidOperationError


def check_integer(value: int, field: str, low: int, high: int | None = None) -> None:
    """Refuse an integer outside `low` to `high` (inclusive; None is no upper bound)."""
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InvalidOperationError(f"{field}: {value} is not allowed; it must be {allowed}")


def check_non_negative(value: float, field: str) -> None:
    """Refuse a number that is negative, infinite or not a number."""
    if not math.isfinite(value) or value < 0:
        raise InvalidOperationError(f"{field}: {value} is not allowed; it must be a finite number, at least 0")


def check_fraction(value: float, field: str) -> None:
    """Refuse a number outside `[0, 1)`."""
    if not 0 <= value < 1:
        raise InvalidOperationError(f"{field}: {value} is not allowed; it must be at least 0 and below 1")


def check_finite(values: Array, field: str) -> None:
    """Refuse an array that holds NaN or infinity; names the first."""
    bad = ~np.isfinite(values)
    if bad.any():
        index = first(bad)
        raise InvalidOperationError(f"{field}{list(index)}: {values[index]} is not allowed; it must be finite")


def check_tokens(values: Array, field: str, vocab_size: int, *, none: int | None = None) -> None:
    """Refuse token ids outside the vocabulary; names the first.

    Args:
        values: token ids of any shape.
        field: its name on the wire.
        vocab_size: ids are 0 to `vocab_size - 1`.
        none: a value that stands for no token and is allowed.
    """
    bad = (values < 0) | (values >= vocab_size)
    if none is not None:
        bad &= values != none
    if bad.any():
        index = first(bad)
        raise InvalidOperationError(
            f"{field}{list(index)}: token id {values[index]} is outside the vocabulary; ids are 0 to {vocab_size - 1}"
        )


def first(mask: Array) -> tuple[int, ...]:
    """Index of the first true cell."""
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(mask)), mask.shape))

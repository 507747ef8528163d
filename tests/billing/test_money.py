"""Amounts are exact integers in the database and come back as they were."""

from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from billing.money import SCALE, UNITS_MAX, AmountError, from_units, plain, round_charge, to_units

units = st.integers(-UNITS_MAX, UNITS_MAX)


@given(units)
def test_what_the_database_holds_comes_back_exactly(number: int) -> None:
    assert to_units(from_units(number)) == number
    assert from_units(number) * SCALE == number


@given(st.decimals(min_value=-(10**6), max_value=10**6, allow_nan=False, allow_infinity=False))
@example(Decimal("999999.123456789013"))  # more digits than a float has
def test_a_rounded_amount_is_stored_without_loss(amount: Decimal) -> None:
    # When
    rounded = round_charge(amount)
    # Then
    assert from_units(to_units(amount)) == rounded
    assert abs(rounded - amount) <= Decimal("5e-13")


@given(units)
def test_digits_read_back_are_the_same_amount(number: int) -> None:
    # When
    text = plain(from_units(number))
    # Then
    assert Decimal(text) == from_units(number)
    assert "E" not in text


@pytest.mark.parametrize(
    ("amount", "rounded"),
    [("0.0000000000005", "0"), ("0.0000000000015", "0.000000000002"), ("0.0000000000025", "0.000000000002")],
)
def test_half_way_cases_go_to_the_even_digit(amount: str, rounded: str) -> None:
    assert round_charge(Decimal(amount)) == Decimal(rounded)


@pytest.mark.parametrize("amount", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_is_no_amount(amount: str) -> None:
    with pytest.raises(ValueError, match="no amount of money"):
        round_charge(Decimal(amount))


@pytest.mark.parametrize(
    ("amount", "text"), [("0.00123", "0.00123"), ("1E+3", "1000"), ("0E-12", "0"), ("2.500", "2.5"), ("10", "10")]
)
def test_digits_are_plain(amount: str, text: str) -> None:
    assert plain(Decimal(amount)) == text


@pytest.mark.parametrize("amount", [Decimal(10**7), Decimal(-(10**7)), Decimal("1E+40")])
def test_what_no_row_can_hold_is_refused(amount: Decimal) -> None:
    with pytest.raises(AmountError, match=r"too large: an amount may be at most 9223372\.036854775807"):
        to_units(amount)


@pytest.mark.parametrize("amount", [Decimal("1E+60"), Decimal("-1E+999999")])
def test_more_digits_than_are_reckoned_with_are_too_large(amount: Decimal) -> None:
    with pytest.raises(AmountError, match="too large"):
        to_units(amount)

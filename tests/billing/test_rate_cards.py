"""A rate card is read as written, or refused with the entry to correct."""

from decimal import Decimal
from pathlib import Path

import pytest

from billing.rate_cards import RateCardError, load_rate_card
from billing.settings import BillingSettings


@pytest.fixture
def card_file(tmp_path: Path) -> Path:
    return tmp_path / "card.toml"


def test_the_card_that_ships_has_prices() -> None:
    # When
    card = load_rate_card(BillingSettings(rate_card=None))
    # Then
    assert len(card.currency) == 3
    assert 0 < card.device_second("cpu") < card.device_second("cuda:NVIDIA H100")


def test_prices_are_exact(card_file: Path) -> None:
    # Given
    card_file.write_text(
        'currency = "EUR"\n[device_seconds]\n"cpu" = "0.1"\n"*" = 2\n[million_tokens."a/b"]\ntrained = "0.30"\n'
    )
    # When
    card = load_rate_card(BillingSettings(rate_card=card_file))
    # Then
    assert card.currency == "EUR"
    assert (card.device_second("cpu"), card.device_second("cuda:x")) == (Decimal("0.1"), Decimal(2))
    assert (card.million("a/b", "trained"), card.million("a/b", "sampled")) == (Decimal("0.30"), Decimal(0))
    assert card.million("other", "trained") == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('currency = "dollars"', "currency must be three capital letters"),
        ("[device_seconds]\ncpu = 0.1", "device_seconds.cpu = 0.1 is not a price"),
        ('[device_seconds]\ncpu = "-1"', "is not a price"),
        ('[device_seconds]\ncpu = "NaN"', "is not a price"),
        ('[device_seconds]\ncpu = "much"', "is not a price"),
        ('device_seconds = "0.1"', "must be a table of prices"),
        ('[million_tokens."*"]\ndreamt = "1"', "the kinds of tokens are trained, prefilled, cached, sampled"),
        ("[discounts]", "unknown entries"),
        ("currency =", "card.toml"),
    ],
)
def test_what_is_no_rate_card_is_refused_with_its_file_and_entry(card_file: Path, text: str, words: str) -> None:
    # Given
    card_file.write_text(text)
    # When
    with pytest.raises(RateCardError) as raised:
        load_rate_card(BillingSettings(rate_card=card_file))
    # Then
    assert words in str(raised.value)
    assert str(card_file) in str(raised.value)


def test_a_missing_file_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(RateCardError, match="PIECEWORK_RATE_CARD"):
        load_rate_card(BillingSettings(rate_card=tmp_path / "none.toml"))

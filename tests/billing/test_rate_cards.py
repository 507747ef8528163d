"""A rate card is read as written, or refused with the line to correct."""

from decimal import Decimal
from pathlib import Path

import pytest

from billing.rate_card_file import RateCardError, parse
from billing.rate_cards import read_card
from billing.settings import BillingSettings


def test_the_card_that_ships_has_prices() -> None:
    # When
    card = parse(read_card(BillingSettings(rate_card=None)))
    # Then
    assert len(card.currency) == 3
    assert 0 < card.device_second("cpu") < card.device_second("cuda:NVIDIA H100")
    assert card.gigabyte_month("state") == 0


@pytest.mark.parametrize(
    ("prices", "priced", "free"),
    [
        ('"*" = "1"', (None, "cpu", "cuda"), ()),
        ('"cuda:NVIDIA H100" = "1"\n"cpu" = "0"', (None, "cuda", "cuda:NVIDIA H100"), ("cpu", "cuda:NVIDIA L4")),
        ('"*" = "0"', (), (None, "cpu")),
        ("", (), (None, "cpu")),
    ],
)
def test_device_time_has_a_price_where_a_class_has_one(
    prices: str, priced: tuple[str | None, ...], free: tuple[str | None, ...]
) -> None:
    card = parse(f"[device_seconds]\n{prices}\n")
    assert [card.prices_device(device) for device in priced] == [True] * len(priced)
    assert [card.prices_device(device) for device in free] == [False] * len(free)


def test_prices_are_exact() -> None:
    # When
    card = parse(
        'currency = "EUR"\n[device_seconds]\n"cpu" = "0.1"\n"*" = 2\n[million_tokens."a/b"]\ntrained = "0.30"\n'
        '[gigabyte_months]\ncheckpoint = "0.10"\n'
    )
    # Then
    assert card.currency == "EUR"
    assert (card.device_second("cpu"), card.device_second("cuda:x")) == (Decimal("0.1"), Decimal(2))
    assert (card.million("a/b", "trained"), card.million("a/b", "sampled")) == (Decimal("0.30"), Decimal(0))
    assert card.million("other", "trained") == 0
    assert (card.gigabyte_month("checkpoint"), card.gigabyte_month("state")) == (Decimal("0.10"), Decimal(0))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('currency = "dollars"', "line 1: currency: must be three capital letters"),
        ("[device_seconds]\ncpu = 0.1", "line 2: device_seconds.cpu: 0.1 is not a price"),
        ('[device_seconds]\n\n"*" = "1"\ncpu = "-1"', "line 4: device_seconds.cpu: '-1' is not a price"),
        ('[device_seconds]\ncpu = "NaN"', "is not a price"),
        ("[device_seconds]\ncpu = true", "is not a price"),
        ('[device_seconds]\ncpu = "much"', "is not a price"),
        ('[device_seconds]\ncpu = "10000000"', "such a price is at most 1000,"),
        ('[device_seconds]\ncpu = "0.0000000000001"', "12 decimal places"),
        ('\ndevice_seconds = "0.1"', "line 2: device_seconds: must be a table"),
        ('[million_tokens."*"]\ntrained = "1"\ndreamt = "1"', "line 3: million_tokens.*.dreamt: unknown kind"),
        ('[million_tokens]\n"a/b" = "1"', "line 2: million_tokens.a/b: must be a table"),
        ('[gigabyte_months]\ntape = "1"', "line 2: gigabyte_months.tape: unknown kind; there are checkpoint, state"),
        ('currency = "USD"\n[discounts]', "line 2: discounts: unknown entry"),
        ("currency =", "end of document"),
    ],
)
def test_what_is_no_rate_card_is_refused_with_its_line_and_entry(text: str, words: str) -> None:
    # When
    with pytest.raises(RateCardError) as raised:
        parse(text, "card.toml")
    # Then
    assert words in str(raised.value)
    assert "card.toml" in str(raised.value)


def test_a_missing_file_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(RateCardError, match="PIECEWORK_RATE_CARD"):
        read_card(BillingSettings(rate_card=tmp_path / "none.toml"))

"""Rate cards over time: the card in force prices, and a new one never touches what was priced before."""

from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from sqlalchemy import Connection

from billing import ledger, rate_cards
from billing.charging import operation_source
from billing.rate_card_file import RateCardError
from billing.settings import BillingSettings
from storage import journal
from storage.database import Database
from storage.journal import Operation
from storage.runs import Run
from tests.factories import NOW, bill, make_account, make_operation, make_run, make_usage

SECOND = timedelta(seconds=1)


def card(price: str, currency: str = "USD") -> str:
    return f'currency = "{currency}"\n[device_seconds]\ncpu = "{price}"\n'


def charged(tx: Connection, run: Run, seq: int, at: datetime) -> Decimal:
    """What one second on the CPU is charged at this moment."""
    operation = make_operation(tx, run, seq)
    bill(tx, run, operation, make_usage(device_ns=10**9), now=at)
    return charge_of(tx, operation)


def charge_of(tx: Connection, operation: Operation) -> Decimal:
    """What the ledger says of an operation."""
    entry = ledger.find(tx, operation_source(operation.id))
    assert entry is not None
    return entry.amount


def test_a_card_holds_from_its_moment_on_and_changes_nothing_before(database: Database) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)
        first = charged(tx, run, 0, NOW)
        # When
        rate_cards.add(tx, card("3"), now=NOW, effective_at=NOW + 60 * SECOND)
        # Then
        assert charged(tx, run, 1, NOW + 59 * SECOND) == first
        assert charged(tx, run, 2, NOW + 60 * SECOND) == Decimal(3)
        assert charge_of(tx, journal.get_operation(tx, f"{run.id}:0")) == first
        assert ledger.balance(tx, run.account_id) == -(2 * first + 3)
        assert ledger.balance(tx, run.account_id, at=NOW + 59 * SECOND) == -2 * first


def test_an_account_with_a_card_of_its_own_is_not_priced_by_the_general_one(database: Database) -> None:
    with database.begin() as tx:
        # Given
        run, other = make_run(tx), make_run(tx, make_account(tx, "other"))
        rate_cards.add(tx, card("7"), now=NOW, account_id=run.account_id)
        # When
        rate_cards.add(tx, card("5"), now=NOW + SECOND)
        later = NOW + 60 * SECOND
        # Then
        assert charged(tx, run, 0, later) == Decimal(7)
        assert charged(tx, other, 0, later) == Decimal(5)


def test_a_card_cannot_begin_in_the_past(database: Database) -> None:
    with database.begin() as tx, pytest.raises(RateCardError, match=r"what is priced stays as it is"):
        rate_cards.add(tx, card("3"), now=NOW, effective_at=NOW)


def test_a_deployment_bills_in_one_currency(database: Database) -> None:
    with database.begin() as tx, pytest.raises(RateCardError, match=r"bills in USD, the card is in EUR"):
        rate_cards.add(tx, card("3", "EUR"), now=NOW)


def test_the_settings_card_is_added_once_and_holds_from_then_on(database: Database, tmp_path: Path) -> None:
    # Given
    settings = BillingSettings(rate_card=tmp_path / "card.toml")
    with database.begin() as tx:
        (tmp_path / "card.toml").write_text(card("2"))
        rate_cards.install_from_settings(tx, now=NOW, settings=settings)
        # When
        (tmp_path / "card.toml").write_text(card("4"))
        for _ in range(2):
            rate_cards.install_from_settings(tx, now=NOW + 60 * SECOND, settings=settings)
        # Then
        prices = [(dated.effective_at, dated.card.device_second("cpu")) for dated in rate_cards.list_cards(tx)]
        assert prices == [
            (NOW + (60 + rate_cards.LEAD_S) * SECOND, Decimal(4)),
            (rate_cards.ALWAYS, Decimal(2)),
        ]

"""The ledger is appended to, exact, and refuses everything else."""

from datetime import timedelta
from decimal import Decimal

import pytest
import sqlalchemy

from billing import ledger, money
from billing.dimensions import Dimensions
from billing.ledger import EntryKind, NewEntry
from storage import billing_tables
from storage.database import Database
from tests.factories import NOW, bill, make_account, make_operation, make_run

TABLE = billing_tables.ledger_entry


def top_up(account_id: str, source: str, units: int, project_id: str | None = None) -> NewEntry:
    return NewEntry(EntryKind.TOP_UP, source, Dimensions(account_id, project_id), -units)


def test_a_source_is_booked_once(database: Database) -> None:
    with database.begin() as tx:
        account = make_account(tx)
        # When
        news = [ledger.append_once(tx, top_up(account.id, "topup:1", 5), now=NOW) for _ in range(2)]
        # Then
        assert news == [True, False]
        assert ledger.balance(tx, account.id) == money.from_units(5)


def test_an_operation_is_charged_once(database: Database) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)
        operation = make_operation(tx, run)
        bill(tx, run, operation)
    # When
    with pytest.raises(sqlalchemy.exc.IntegrityError), database.begin() as tx:
        bill(tx, run, operation)
    # Then
    with database.read() as tx:
        assert tx.execute(sqlalchemy.select(sqlalchemy.func.count()).select_from(TABLE)).scalar_one() == 1


def test_a_balance_can_be_asked_for_at_any_past_moment_and_by_project(database: Database) -> None:
    with database.begin() as tx:
        # Given
        account = make_account(tx)
        for hour, (units, project) in enumerate([(10, None), (5, "p"), (-3, "p")]):
            entry = top_up(account.id, f"topup:{hour}", units, project)
            ledger.append(tx, [entry], now=NOW + timedelta(hours=hour))
        # Then
        at = [ledger.balance(tx, account.id, at=NOW + timedelta(hours=hour)) for hour in (-1, 0, 1, 2)]
        assert at == [money.from_units(units) for units in (0, 10, 15, 12)]
        assert ledger.balance(tx, account.id, project_id="p") == money.from_units(2)


def test_sums_beyond_64_bits_are_exact(database: Database) -> None:
    with database.begin() as tx:
        # Given: eleven entries of the largest amount there is, and one unit
        account = make_account(tx)
        entries = [top_up(account.id, f"topup:{number}", money.UNITS_MAX) for number in range(11)]
        # When
        ledger.append(tx, [*entries, top_up(account.id, "topup:unit", 1)], now=NOW)
        # Then
        assert ledger.balance(tx, account.id) == money.from_units(11 * money.UNITS_MAX + 1)
        assert ledger.balance(tx, account.id) > Decimal(10**8)


@pytest.mark.parametrize(
    "change",
    [
        sqlalchemy.update(TABLE).values(amount=1),
        sqlalchemy.update(TABLE).values(note="another"),
        sqlalchemy.update(TABLE).values(operation_id=None),
        sqlalchemy.delete(TABLE),
    ],
)
def test_the_database_refuses_to_edit_an_entry(database: Database, change: sqlalchemy.UpdateBase) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)
        bill(tx, run, make_operation(tx, run))
    # Then
    with pytest.raises(sqlalchemy.exc.DBAPIError, match="append-only"), database.engine.begin() as tx:
        tx.execute(change)

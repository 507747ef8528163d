"""Charges for storage in everything that reads the bill: cost, usage events, `verify`, invoices."""

from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction

import pytest
import sqlalchemy
from sqlalchemy import Connection, insert, select

from billing import closing, cost, invoice_lines, invoices, ledger, money, usage_events, usage_totals, verify
from billing.usage_events import EventKind
from billing.usage_totals import Scope
from billing.verify import Wrong
from storage import billing_tables, tables
from storage.clock import FrozenClock
from storage.database import Database
from storage.runs import Run
from tests.contracts.storage_kit import ENTRY, HOUR, USAGE, expected, keep, meter, price_storage, set_clock
from tests.contracts.test_verify import altered
from tests.factories import NOW, bill, make_account, make_operation, make_run, make_session, make_usage

SPAN = billing_tables.storage_span
END = NOW + timedelta(minutes=150)
GB = 10**9
KEPT = [(GB, NOW, END)]


@pytest.fixture
def clock(database: Database) -> Iterator[FrozenClock]:
    """The database's."""
    now = database.now
    yield set_clock(database)
    database.now = now  # type: ignore[method-assign]


@pytest.fixture
def run(database: Database, clock: FrozenClock) -> Run:
    """Two and a half hours of a checkpoint were charged to it, another run's too; its state is free."""
    with database.begin() as tx:
        price_storage(tx)
        run = make_run(tx)
        keep(tx, run, GB, since=NOW, until=END)
        keep(tx, make_run(tx, session=make_session(tx, make_account(tx, "other"))), 7 * GB, since=NOW, until=END)
        values = {"object_key": "s", "size_bytes": 5, "sha256": "", "created_at": NOW}
        tx.execute(insert(tables.snapshot).values(run_id=run.id, seq=1, **values))
        bill(tx, run, make_operation(tx, run), make_usage(tokens_trained=1))
    meter(database, clock, at=NOW + 4 * HOUR)
    return run


def found(tx: Connection) -> list[tuple[Wrong, str]]:
    """What `verify` finds; the run's operation was never completed."""
    return [(one.wrong, one.source) for one in verify.differences(tx, page_rows=2)]


def test_cost_shows_both_kinds_of_storage_and_adds_up_to_the_ledger(database: Database, run: Run) -> None:
    with database.read() as tx:
        report = cost.report(tx, Scope(run_id=run.id))
        rows = {row.usage.kind: row.usage for row in report.rows}
        assert sorted(rows) == ["checkpoint_storage", "forward_backward", "state_storage"]
        stored = rows["checkpoint_storage"]
        assert stored.byte_seconds == 9000 * GB
        assert stored.charge == sum(units for _, units in expected(KEPT, [NOW + n * HOUR for n in range(4)]).values())
        assert (stored.operations, stored.device, stored.base_model) == (0, None, run.base_model)
        assert (rows["state_storage"].byte_seconds, rows["state_storage"].charge) == (5 * 3 * 3600, 0)
        assert report.as_json()["total"]["byte_seconds"] == 9000 * GB + 5 * 3 * 3600
        assert money.to_units(report.cost) == ledger.total_units(tx, ENTRY.c.run_id == run.id)
        assert money.to_units(cost.of_runs(tx, run.account_id, [run.id])[run.id]) == money.to_units(report.cost)
        everything = sum(total.charge for total in usage_totals.totals(tx))
        assert everything == ledger.total_units(tx)


def test_ranges_that_meet_share_no_hour_of_storage(database: Database, run: Run) -> None:
    cuts = [NOW, NOW + timedelta(minutes=1), NOW + HOUR, NOW + timedelta(minutes=119), NOW + timedelta(hours=9)]
    with database.read() as tx:
        parts = [
            usage_totals.charged(tx, Scope(run_id=run.id, since=since, until=until))
            for since, until in zip([None, *cuts], [*cuts, None], strict=True)
        ]
        assert sum(parts) == usage_totals.charged(tx, Scope(run_id=run.id)) > 0
        assert parts[0] == 0
        assert parts[1] >= 2 * parts[4] > 0


def test_usage_is_asked_for_by_kind_and_base_model(database: Database, run: Run) -> None:
    # given operations and both kinds of storage of a run
    with database.read() as tx:
        by_kind = {total.kind: total for total in usage_totals.totals(tx, by=("kind",))}
        assert set(by_kind) == {"checkpoint_storage", "forward_backward", "state_storage"}
        for kinds in (
            ["forward_backward"],
            ["state_storage"],
            ["checkpoint_storage", "forward_backward"],
            list(by_kind),
            [],
        ):
            # when
            found = usage_totals.totals(tx, Scope(kinds=kinds, base_model=run.base_model), by=("kind",))
            # then
            assert found == [by_kind[kind] for kind in sorted(kinds)]
        assert usage_totals.totals(tx, Scope(base_model="another")) == []


def test_sums_of_bytes_may_exceed_64_bits(database: Database, clock: FrozenClock) -> None:
    with database.begin() as tx:
        price_storage(tx)
        run = make_run(tx)
        keep(tx, run, 2 * 10**15, since=NOW)
    meter(database, clock, at=NOW + 5 * HOUR)
    with database.read() as tx:
        (total,) = usage_totals.totals(tx, by=())
        assert total.byte_seconds == 4 * 3600 * 2 * 10**15 > 2**63


def test_usage_events_tell_storage_by_hour_with_its_price(database: Database, run: Run) -> None:
    with database.read() as tx:
        events = usage_events.list_events(tx, run.account_id, since=NOW, until=NOW + 5 * HOUR)
        stored = [event for event in events if event.kind is EventKind.STORAGE]
        state = [event for event in events if event.kind is EventKind.STATE]
        hours = {event.hour: (event.count, event.charge) for event in stored}
        assert hours == expected(KEPT, [NOW + number * HOUR for number in range(4)])
        assert {event.price_of_gigabyte_month for event in stored} == {Decimal("0.03")}
        assert [(event.count, event.charge, event.price_of_gigabyte_month) for event in state] == [(5 * 3600, 0, 0)] * 3


def test_a_bill_with_storage_is_found_right(database: Database, run: Run) -> None:
    assert run.account_id
    with database.read() as tx:
        looked_at: list[int] = []
        assert list(verify.differences(tx, seen=looked_at.append)) == []
        assert sum(looked_at) == verify.num_rows(tx)


@pytest.mark.parametrize(
    ("table", "change", "wrong"),
    [
        (ENTRY, {"amount": 1}, Wrong.AMOUNT),
        (ENTRY, {"rate_card_id": None}, Wrong.CARD),
        (ENTRY, {"project_id": "another"}, Wrong.DIMENSIONS),
        (ENTRY, {"source": "storage:0"}, Wrong.SOURCE),
        (USAGE, {"byte_seconds": 3600 * GB - 1}, Wrong.BYTES),
        (USAGE, {"project_id": "another"}, Wrong.DIMENSIONS),
    ],
)
def test_an_altered_row_of_storage_is_found(
    database: Database, run: Run, table: sqlalchemy.Table, change: dict[str, object], wrong: Wrong
) -> None:
    with database.read() as tx:
        usage_id = tx.execute(select(USAGE.c.id).where(USAGE.c.run_id == run.id).order_by(USAGE.c.id)).scalars().first()
    key = ENTRY.c.storage_usage_id if table is ENTRY else USAGE.c.id
    with altered(database) as tx:
        tx.execute(sqlalchemy.update(table).where(key == usage_id).values(**change))
        assert (wrong, f"storage:{usage_id}") in found(tx)
        assert {source for _, source in found(tx)} == {f"storage:{usage_id}"}


def test_a_row_and_its_charge_that_were_altered_alike_are_found(database: Database, run: Run) -> None:
    with altered(database) as tx:
        row = tx.execute(select(USAGE.c.id).where(USAGE.c.run_id == run.id, USAGE.c.hour == NOW)).first()
        assert row is not None
        half = Fraction(1, 2) * Fraction("0.03") * 10**12 / 720
        tx.execute(sqlalchemy.update(USAGE).where(USAGE.c.id == row.id).values(byte_seconds=1800 * GB))
        tx.execute(sqlalchemy.update(ENTRY).where(ENTRY.c.storage_usage_id == row.id).values(amount=round(half)))
        assert found(tx) == [(Wrong.BYTES, f"storage:{row.id}")]


def test_a_charge_for_storage_that_was_taken_away_is_found(database: Database, run: Run) -> None:
    with altered(database) as tx:
        gone = tx.execute(select(ENTRY.c.storage_usage_id, ENTRY.c.source).where(ENTRY.c.run_id == run.id)).all()[-1]
        tx.execute(sqlalchemy.delete(ENTRY).where(ENTRY.c.source == gone.source))
        assert found(tx) == [(Wrong.MISSING, gone.source)]


def test_a_charge_whose_storage_was_taken_away_is_found(database: Database, run: Run) -> None:
    with altered(database) as tx:
        row = tx.execute(select(USAGE.c.id).where(USAGE.c.run_id == run.id, USAGE.c.kind == "checkpoint")).first()
        assert row is not None
        tx.execute(sqlalchemy.delete(USAGE).where(USAGE.c.id == row.id))
        assert found(tx) == [(Wrong.BYTES, f"storage of {run.id}"), (Wrong.WITHOUT_USAGE, f"storage:{row.id}")]


def test_an_hour_that_was_taken_away_with_its_charge_is_found(database: Database, run: Run) -> None:
    with altered(database) as tx:
        row = tx.execute(select(USAGE.c.id).where(USAGE.c.run_id == run.id, USAGE.c.kind == "checkpoint")).first()
        assert row is not None
        tx.execute(sqlalchemy.delete(ENTRY).where(ENTRY.c.storage_usage_id == row.id))
        tx.execute(sqlalchemy.delete(USAGE).where(USAGE.c.id == row.id))
        assert found(tx) == [(Wrong.BYTES, f"storage of {run.id}")]


def test_an_invoice_has_a_line_for_storage_that_leads_to_its_hours(database: Database, run: Run) -> None:
    end = NOW + timedelta(hours=5)
    with database.begin() as tx:
        invoice = closing.close(tx, run.account_id, end=end, now=end)
        assert invoice is not None
        (line,) = [line for line in invoice_lines.of_invoice(tx, invoice.id) if line.group["storage"]]
        traced = list(invoice_lines.trace(tx, invoice.id, line.group))
        # then the line is the sum of the hours that it leads to
        hours = expected(KEPT, [NOW + number * HOUR for number in range(4)])
        assert {row["storage_hour"]: (row["storage_byte_seconds"], row["amount"]) for row in traced} == hours
        assert (line.group["storage"], line.entries, line.quantities) == ("checkpoint", 3, {"byte_seconds": 9000 * GB})
        assert line.units == sum(units for _, units in hours.values())
        assert list(invoices.check(tx)) == []

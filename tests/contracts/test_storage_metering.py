"""What was kept is metered hour by hour: once, exactly, at the prices in force, whatever is cut short."""

from collections.abc import Iterator
from datetime import timedelta
from fractions import Fraction
from typing import Any

import pytest
from sqlalchemy import func, insert, select

from billing import budgets, ledger, storage_metering, verify
from billing.budgets import Scope
from billing.storage_metering import GRACE
from storage import billing_tables, tables
from storage.clock import FrozenClock
from storage.database import Database
from tests.contracts.storage_kit import ENTRY, HOUR, USAGE, charged, expected, keep, meter, price_storage, set_clock
from tests.factories import NOW, make_account, make_run, make_session

HOURS = [NOW + number * HOUR for number in range(8)]


@pytest.fixture
def clock(database: Database) -> Iterator[FrozenClock]:
    """The database's."""
    now = database.now
    yield set_clock(database)
    database.now = now  # type: ignore[method-assign]  # `set_clock` has put a stand-in in its place


def test_spans_over_hours_add_up_to_the_byte(database: Database, clock: FrozenClock) -> None:
    # given checkpoints that begin and end within a second, an hour, and over several
    minutes = [(7, 3.7, 31.2), (10**12 + 1, 59.99, 200.01), (333_333_333, 0, 60), (5, 61, 61.001), (11, 90, 300)]
    kept = [
        (size, NOW + timedelta(minutes=first), NOW + timedelta(minutes=last, microseconds=17))
        for size, first, last in minutes
    ]
    with database.begin() as tx:
        price_storage(tx)
        run = make_run(tx)
        for size, since, until in kept:
            keep(tx, run, size, since=since, until=until)
    # when
    meter(database, clock, at=NOW + 7 * HOUR)
    # then
    with database.read() as tx:
        found = charged(tx)
        assert found == expected(kept, HOURS)
        assert sum(units for _, units in found.values()) == ledger.total_units(tx)
        whole = sum(size * (int(until.timestamp()) - int(since.timestamp())) for size, since, until in kept)
        assert sum(byte_seconds for byte_seconds, _ in found.values()) == whole


def test_an_hour_is_metered_only_when_it_is_over(database: Database, clock: FrozenClock) -> None:
    with database.begin() as tx:
        price_storage(tx)
        keep(tx, make_run(tx), 10**9, since=NOW)
    nums = []
    for moment in (NOW + HOUR, NOW + HOUR + GRACE - timedelta(seconds=1), NOW + HOUR + GRACE):
        meter(database, clock, at=moment)
        with database.read() as tx:
            nums.append(len(charged(tx)))
    assert nums == [0, 0, 1]


def test_what_is_deleted_within_an_hour_is_charged_until_then(database: Database, clock: FrozenClock) -> None:
    with database.begin() as tx:
        price_storage(tx)
        keep(tx, make_run(tx), 10**9, since=NOW, until=NOW + timedelta(minutes=90))
    meter(database, clock, at=NOW + 4 * HOUR)
    with database.read() as tx:
        assert {hour: used for hour, (used, _) in charged(tx).items()} == {
            NOW: 3600 * 10**9,
            NOW + HOUR: 1800 * 10**9,
        }


def test_every_account_is_charged_for_its_own(database: Database, clock: FrozenClock) -> None:
    # given two accounts, one with a card of its own
    with database.begin() as tx:
        price_storage(tx)
        runs = [make_run(tx, session=make_session(tx, make_account(tx, name))) for name in ("acme", "other")]
        price_storage(tx, "0.5", account_id=runs[1].account_id)
        for size, run in zip((10**9, 10**8), runs, strict=True):
            keep(tx, run, size, since=NOW)
    # when
    meter(database, clock, at=NOW + 3 * HOUR)
    # then
    with database.read() as tx:
        for size, run, price in zip((10**9, 10**8), runs, ("0.03", "0.5"), strict=True):
            kept = [(size, NOW, NOW + 9 * HOUR)]
            assert charged(tx, account_id=run.account_id) == expected(kept, HOURS[:2], Fraction(price))
            row = tx.execute(select(ENTRY).where(ENTRY.c.run_id == run.id)).first()
            assert row is not None
            assert (row.account_id, row.session_id) == (run.account_id, run.session_id)
            assert row.source == f"storage:{row.storage_usage_id}"


def test_an_hour_is_priced_by_the_card_in_force_when_it_began(database: Database, clock: FrozenClock) -> None:
    # given prices that change with an hour, and within one
    with database.begin() as tx:
        first = price_storage(tx)
        second = price_storage(tx, "0.3", effective_at=NOW + HOUR)
        third = price_storage(tx, "3", effective_at=NOW + timedelta(minutes=150))
        keep(tx, make_run(tx), 10**9, since=NOW)
    # when
    meter(database, clock, at=NOW + 4 * HOUR)
    # then
    with database.read() as tx:
        cards = tx.execute(select(ENTRY.c.rate_card_id).order_by(ENTRY.c.id)).scalars().all()
        assert cards == [first, second, second]
    # and what comes later changes nothing
    before = _everything(database)
    with database.begin() as tx:
        price_storage(tx, "9", now=clock.now())
    meter(database, clock, at=NOW + 4 * HOUR + GRACE)
    with database.read() as tx:
        assert tx.execute(select(ENTRY.c.rate_card_id).order_by(ENTRY.c.id)).scalars().all() == [*cards, third]
    assert _everything(database)[: len(before)] == before


def test_metering_twice_is_metering_once(database: Database, clock: FrozenClock) -> None:
    with database.begin() as tx:
        price_storage(tx)
        keep(tx, make_run(tx), 10**9, since=NOW)
    meter(database, clock, at=NOW + 3 * HOUR)
    before = _everything(database)
    # when asked again, and when another worker metered the same page at the same time
    meter(database, clock, at=NOW + 3 * HOUR)
    storage_metering._meter_page(database, NOW, "", 9)
    storage_metering._conclude(database, NOW)
    # then
    assert _everything(database) == before


@pytest.mark.parametrize("reached", [1, 2, 3])
def test_a_crash_between_pages_neither_loses_nor_doubles_a_run(
    database: Database, clock: FrozenClock, monkeypatch: pytest.MonkeyPatch, reached: int
) -> None:
    # given a pass that ends after some pages
    with database.begin() as tx:
        price_storage(tx)
        for size in range(1, 8):
            keep(tx, make_run(tx), size * 10**9, since=NOW)
    clock.advance(2 * 3600)
    charge, calls = storage_metering._charge, []

    def crash(*arguments: Any, **named: Any) -> None:
        calls.append(charge(*arguments, **named))
        if len(calls) == reached:
            raise ZeroDivisionError

    monkeypatch.setattr(storage_metering, "_charge", crash)
    with pytest.raises(ZeroDivisionError):
        storage_metering.meter(database, pass_s=60, page_runs=2)
    monkeypatch.undo()
    # when
    assert storage_metering.meter(database, pass_s=60, page_runs=2)
    # then
    with database.read() as tx:
        sizes = tx.execute(select(USAGE.c.byte_seconds).order_by(USAGE.c.byte_seconds)).scalars().all()
        assert sizes == [size * 3600 * 10**9 for size in range(1, 8)]
        assert tx.execute(select(func.count()).select_from(ENTRY)).scalar_one() == 7


def test_a_week_that_nobody_metered_is_caught_up_a_part_at_a_time(database: Database, clock: FrozenClock) -> None:
    # given
    kept = [(10**9, NOW, NOW + timedelta(days=30)), (10**10, NOW, NOW + timedelta(days=3, minutes=17))]
    with database.begin() as tx:
        price_storage(tx)
        run = make_run(tx)
        keep(tx, run, kept[0][0], since=NOW)
        keep(tx, run, kept[1][0], since=NOW, until=kept[1][2])
    clock.advance(7 * 86_400 + GRACE.total_seconds())
    # when
    passes = 1
    while not storage_metering.meter(database, pass_s=0):
        passes += 1
    # then
    assert passes > 7 * 24
    with database.read() as tx:
        assert charged(tx) == expected(kept, [NOW + number * HOUR for number in range(7 * 24)])


def test_pages_are_of_a_size_however_much_is_kept(
    database: Database, clock: FrozenClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given many runs with checkpoints, and some without
    with database.begin() as tx:
        price_storage(tx)
        session = make_session(tx)
        runs = [make_run(tx, session=session, model_seq_id=number) for number in range(23)]
        for run in runs[:20]:
            for _ in range(3):
                keep(tx, run, 10**9, since=NOW)
    clock.advance(2 * 3600)
    pages = []
    kept = storage_metering._kept

    def noted(tx: Any, hour: Any, run_ids: Any) -> Any:
        pages.append(len(run_ids))
        return kept(tx, hour, run_ids)

    monkeypatch.setattr(storage_metering, "_kept", noted)
    # when
    assert storage_metering.meter(database, pass_s=60, page_runs=6)
    # then
    assert pages == [6, 6, 6, 2, 0]
    with database.read() as tx:
        assert tx.execute(select(USAGE.c.byte_seconds)).scalars().all() == [3 * 3600 * 10**9] * 20


@pytest.mark.parametrize("price", ["0", "0.01"])
def test_state_is_shown_and_free_unless_it_has_a_price(database: Database, clock: FrozenClock, price: str) -> None:
    # given
    with database.begin() as tx:
        price_storage(tx, state=price)
        run = make_run(tx)
        for seq in (3, 4):
            values = {"object_key": f"s{seq}", "size_bytes": 10**9, "sha256": "", "created_at": NOW}
            tx.execute(insert(tables.snapshot).values(run_id=run.id, seq=seq, **values))
    # when
    meter(database, clock, at=NOW + 2 * HOUR)
    # then
    with database.read() as tx:
        assert charged(tx, kind="state") == expected([(2 * 10**9, NOW, NOW + HOUR)], HOURS, Fraction(price))
        assert bool(ledger.total_units(tx)) == (price != "0")


def test_budgets_count_charges_for_storage(database: Database, clock: FrozenClock) -> None:
    with database.begin() as tx:
        price_storage(tx)
        run = make_run(tx)
        for scope, scope_id in ((Scope.ACCOUNT, run.account_id), (Scope.RUN, run.id), (Scope.RUN, "another")):
            budgets.add(tx, run.account_id, scope, scope_id, cap=1, now=NOW)
        keep(tx, run, 10**9, since=NOW)
    meter(database, clock, at=NOW + 2 * HOUR)
    with database.read() as tx:
        units = ledger.total_units(tx)
        found = budgets.list_budgets(tx, [run.account_id], now=clock.now())
        assert units > 0
        assert [budget.spent for budget in found] == [units, units, 0]
        assert [budget.is_exhausted for budget in found] == [True, True, False]


def test_a_charge_that_no_row_holds_keeps_nobody_elses_storage_from_being_charged(
    database: Database, clock: FrozenClock
) -> None:
    with database.begin() as tx:
        price_storage(tx, "1000000")
        small, large = make_run(tx), make_run(tx)
        keep(tx, small, 10**9, since=NOW)
        keep(tx, large, 10**15, since=NOW)
    meter(database, clock, at=NOW + 2 * HOUR)
    with database.read() as tx:
        assert tx.execute(select(ENTRY.c.run_id)).scalars().all() == [small.id]
        assert tx.execute(select(func.count()).select_from(billing_tables.storage_hour)).scalar_one() == 1


def test_more_bytes_than_a_row_holds_keep_nobody_elses_storage_from_being_metered(
    database: Database, clock: FrozenClock
) -> None:
    # given
    with database.begin() as tx:
        price_storage(tx)
        small, large = make_run(tx), make_run(tx)
        keep(tx, small, 10**9, since=NOW)
        for _ in range(3):
            keep(tx, large, 10**15, since=NOW)
    # when
    meter(database, clock, at=NOW + 2 * HOUR)
    # then: it is cut, and found to be
    with database.read() as tx:
        found = {row.run_id: row.byte_seconds for row in tx.execute(select(USAGE))}
        assert found == {small.id: 3600 * 10**9, large.id: storage_metering.BYTE_SECONDS_MAX}
        assert [each.wrong for each in verify.differences(tx)] == [verify.Wrong.BYTES]


def _everything(database: Database) -> list[Any]:
    with database.read() as tx:
        return list(tx.execute(select(USAGE, ENTRY).outerjoin(ENTRY, ENTRY.c.storage_usage_id == USAGE.c.id)))

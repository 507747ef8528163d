"""Rollups plus what is not rolled up are all usage: by any dimension, in any range of time, at every moment."""

import threading
from collections.abc import Sequence
from datetime import datetime, timedelta
from decimal import Decimal

import pytest
from sqlalchemy import Connection, delete, event, func, insert, select, update
from sqlalchemy.exc import DatabaseError

from billing import ledger, rate_cards, rollups, usage_totals, verify
from billing.money import AmountError, from_units, to_units
from billing.rollups import rebuild, roll_up
from billing.usage import UsageRow
from billing.usage_totals import Scope, UsageTotal
from storage import billing_tables, tables, workers
from storage.database import Database
from tests.factories import NOW, bill, make_account, make_operation, make_run, make_session, make_usage

HOUR = timedelta(hours=1)
CARD = """
[million_tokens."*"]
trained = "2"
"""
NUM_RUNS = 3
MOMENTS = [NOW + timedelta(minutes=20 * place) for place in range(10)]
CUTS = [None, NOW, NOW + HOUR, NOW + timedelta(minutes=30), NOW + timedelta(minutes=95), NOW + timedelta(hours=9)]
BYS: list[tuple[str, ...]] = [(), ("run_id",), ("hour", "kind"), ("account_id", "session_id"), ("batch", "device")]


def use(database: Database, moments: Sequence[datetime] = MOMENTS) -> None:
    """Let a few runs of two accounts complete an operation at each of these moments."""
    with database.begin() as tx:
        rate_cards.add(tx, CARD, now=NOW - HOUR)
        workers.register(tx, worker_id="w", host="here", pid=1, device="cpu", now=NOW)
        for number in range(NUM_RUNS):
            session = make_session(tx, make_account(tx, "acme" if number else "other"))
            run = make_run(tx, session=session)
            for seq, moment in enumerate(moments):
                used = make_usage(device_ns=10**9 + seq, tokens_trained=1 + 10 * seq + number)
                bill(tx, run, make_operation(tx, run, seq, ("forward", "optim_step")[seq % 2]), used, now=moment)


def read_all(database: Database) -> list[Sequence[UsageTotal]]:
    """Usage in every way it is asked for here."""
    with database.read() as tx:
        return [
            usage_totals.totals(tx, Scope(since=since, until=until), by=by)
            for since in CUTS
            for until in CUTS
            for by in BYS
        ]


def test_reading_gives_the_same_whatever_is_rolled_up(database: Database) -> None:
    # Given
    use(database)
    before = read_all(database)
    # When: a little more is rolled up each time
    passes = 0
    while not roll_up(database, pass_s=0, batch=7):
        passes += 1
        # Then
        assert read_all(database) == before
    assert passes == NUM_RUNS * len(MOMENTS) // 7
    assert read_all(database) == before
    with database.read() as tx:
        assert sum(total.charge for total in usage_totals.totals(tx)) == ledger.total_units(tx)


def test_a_range_counts_what_finished_in_it(database: Database) -> None:
    use(database)
    roll_up(database, pass_s=60)
    with database.read() as tx:
        for since in CUTS:
            for until in CUTS:
                # When
                total = usage_totals.totals(tx, Scope(since=since, until=until), by=())
                # Then
                within = [m for m in MOMENTS if (since is None or m >= since) and (until is None or m < until)]
                assert sum(part.operations for part in total) == NUM_RUNS * len(within)


def test_each_dimension_is_told_apart(database: Database) -> None:
    # Given
    with database.begin() as tx:
        sessions = [make_session(tx), make_session(tx)]
        tx.execute(update(tables.session).where(tables.session.c.id == sessions[0].id).values(batch="night"))
        for session in sessions:
            run = make_run(tx, session=session)
            bill(tx, run, make_operation(tx, run))
    # When
    for _ in range(2):
        with database.read() as tx:
            found = usage_totals.totals(tx, by=("batch", "session_id", "project_id", "api_key_id"))
            of_batch = usage_totals.totals(tx, Scope(batch="night"), by=("session_id",))
        # Then
        assert {(total.batch, total.session_id) for total in found} == {
            ("night", sessions[0].id),
            (None, sessions[1].id),
        }
        assert {(total.project_id, total.api_key_id) for total in found} == {(None, None)}
        assert [total.session_id for total in of_batch] == [sessions[0].id]
        roll_up(database, pass_s=60)


def test_late_records_are_added_to_their_hour(database: Database) -> None:
    # Given
    use(database)
    roll_up(database, pass_s=60)
    # When: it is committed after its hour was rolled up
    with database.begin() as tx:
        run = make_run(tx)
        bill(tx, run, make_operation(tx, run), make_usage(device_ns=5), now=NOW)
    before = read_all(database)
    roll_up(database, pass_s=60)
    # Then
    assert read_all(database) == before
    with database.read() as tx:
        assert tx.execute(select(func.sum(billing_tables.usage_rollup.c.operations))).scalar_one() == 31


def test_rebuilding_mends_rollups_that_are_wrong(database: Database) -> None:
    # Given
    use(database)
    before = read_all(database)
    roll_up(database, pass_s=60)
    rollup = billing_tables.usage_rollup
    with database.begin() as tx:
        tx.execute(delete(rollup).where(rollup.c.hour == NOW))
        tx.execute(update(rollup).values(operations=rollup.c.operations + 1))
    assert read_all(database) != before
    # When
    rebuild(database)
    # Then
    assert read_all(database) == before
    with database.read() as tx:
        (worker,) = workers.list_workers(tx, seen_after=NOW - HOUR)
        assert worker.rolled_up_ns == sum(total.device_ns for total in usage_totals.totals(tx))


def test_a_pass_that_fails_changes_nothing(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given
    use(database)
    before = read_all(database)

    def fail(*_arguments: object) -> None:
        raise ZeroDivisionError

    # When
    monkeypatch.setattr(rollups, "_note_rolled_up", fail)
    with pytest.raises(ZeroDivisionError):
        roll_up(database, pass_s=60)
    monkeypatch.undo()
    # Then
    assert read_all(database) == before
    assert roll_up(database, pass_s=60)
    assert read_all(database) == before


def test_records_from_before_the_ledger_are_charged_at_the_prices_of_their_time(database: Database) -> None:
    # Given
    with database.begin() as tx:
        rate_cards.add(tx, CARD, now=NOW - HOUR)
        run = make_run(tx)
        operation = make_operation(tx, run)
        row = UsageRow(
            usage=make_usage(tokens_trained=10**6),
            operation_id=operation.id,
            account_id=run.account_id,
            project_id=None,
            api_key_id=None,
            session_id=run.session_id,
            batch=None,
            run_id=run.id,
            sampling_session_id=None,
            kind=operation.kind,
            base_model=run.base_model,
            finished_at=NOW - HOUR / 2,
        )
        tx.execute(insert(billing_tables.usage_record).values(**row.values()))
        rate_cards.add(tx, CARD.replace("2", "9"), now=NOW + HOUR)
    # When
    for _ in range(2):
        roll_up(database, pass_s=60)
    # Then
    with database.read() as tx:
        assert from_units(usage_totals.charged(tx, Scope(run_id=run.id))) == Decimal(2)
        entry = ledger.find(tx, f"operation:{operation.id}")
        assert entry is not None
        assert entry.amount == Decimal(2)
        assert ledger.total_units(tx) == to_units(Decimal(2))
        assert entry.created_at >= NOW > row.finished_at
        assert list(verify.differences(tx)) == []


def test_charges_of_an_hour_that_exceed_a_row_are_refused_and_still_read_exactly(database: Database) -> None:
    # Given
    with database.begin() as tx:
        rate_cards.add(tx, CARD.replace('"2"', '"1000000"'), now=NOW - HOUR)
        run = make_run(tx)
        for seq in range(2):
            bill(tx, run, make_operation(tx, run, seq), make_usage(tokens_trained=5 * 10**6))
    # When
    with pytest.raises((AmountError, DatabaseError), match=r"too large|out of range"):
        roll_up(database, pass_s=60, batch=1)
    # Then
    with database.read() as tx:
        assert from_units(usage_totals.charged(tx, Scope(run_id=run.id))) == Decimal(10**7)


def test_what_is_rolled_up_while_all_is_rebuilt_counts_once(database: Database) -> None:
    # Given
    use(database)
    before = read_all(database)
    passes: list[threading.Thread] = []

    def roll_up_meanwhile(_tx: Connection, _cursor: object, statement: str, *_: object) -> None:
        """Between deleting rollups and taking the marks off their records, another process rolls up."""
        if statement.startswith("UPDATE usage_record") and not passes:
            passes.append(threading.Thread(target=roll_up, args=(database,), kwargs={"pass_s": 60}))
            passes[0].start()
            passes[0].join(0.5)

    event.listen(database.engine, "before_cursor_execute", roll_up_meanwhile)
    # When
    rebuild(database)
    event.remove(database.engine, "before_cursor_execute", roll_up_meanwhile)
    passes[0].join()
    # Then
    assert read_all(database) == before
    roll_up(database, pass_s=60)
    assert read_all(database) == before

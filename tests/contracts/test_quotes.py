"""Quotes go by what was measured, and are held against what became of them."""

from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal

import pytest
import sqlalchemy
from sqlalchemy import Connection, event

from billing import quotes, rate_cards, rollups
from billing.money import AmountError
from billing.quotes import Past, Quote, Speed, Work
from storage import tables
from storage.database import Database
from storage.runs import Run
from tests.factories import NOW, bill, make_operation, make_run, make_usage

CARD = '[device_seconds]\n"cpu" = "0.5"\n"cuda" = "3"\n[million_tokens."*"]\ntrained = "2"\n'
WORK = Work(examples=100, tokens=10_000, epochs=3, batch_size=32)
LATER = NOW + timedelta(hours=1)


@pytest.fixture
def run(database: Database) -> Run:
    with database.begin() as tx:
        rate_cards.add(tx, CARD, now=NOW - timedelta(days=60))
        return make_run(tx)


def train(
    tx: Connection, run: Run, seq: int, *, at: datetime = NOW, kind: str = "forward_backward", **used: object
) -> None:
    bill(tx, run, make_operation(tx, run, seq, kind), make_usage(**used), now=at)


def make(tx: Connection, run: Run, work: Work, *, now: datetime, device: str | None = None) -> Quote:
    """A quote for the run's account and base model."""
    speed = quotes.find_speed(tx, run.base_model, now=now, device=device)
    return quotes.make(tx, run.account_id, run.base_model, work, speed, now=now)


def test_work_counts_steps_by_epochs_and_begun_batches() -> None:
    assert (WORK.steps, WORK.total_tokens) == (3 * 4, 30_000)


def test_where_nothing_was_measured_tokens_alone_are_priced(database: Database, run: Run) -> None:
    with database.begin() as tx:
        made = make(tx, run, WORK, now=NOW)
    assert (made.device, made.device_ns, made.tokens) == ("", 0, 30_000)
    assert made.amount == Decimal("0.06")


@pytest.mark.parametrize("rolled_up", [False, True])
def test_device_time_is_what_tokens_and_steps_have_taken(database: Database, run: Run, *, rolled_up: bool) -> None:
    # given 2 us a token, 7 ms a step; other models, old usage and samples do not count
    with database.begin() as tx:
        train(tx, run, 0, device_ns=2_000_000, tokens_trained=1_000)
        train(tx, run, 1, device_ns=4_000_000, tokens_trained=2_000)
        train(tx, run, 2, kind="optim_step", device_ns=7_000_000)
        train(tx, run, 3, at=NOW - timedelta(days=31), device_ns=10**12, tokens_trained=1)
        train(tx, run, 4, kind="forward", device_ns=10**12, tokens_trained=1)
        other = make_run(tx, base_model="another", model_seq_id=1)
        train(tx, other, 0, device_ns=10**12, tokens_trained=1)
    if rolled_up:
        rollups.roll_up(database, pass_s=60)
    # When
    with database.begin() as tx:
        measured = quotes.speeds(tx, run.base_model, now=LATER)
        made = make(tx, run, WORK, now=LATER)
    # Then
    assert measured == [Speed("cpu", 3_000, 6_000_000, 1, 7_000_000)]
    assert (made.device, made.device_ns) == ("cpu", 30_000 * 2_000 + 12 * 7_000_000)
    assert made.amount == Decimal("0.144") * Decimal("0.5") + Decimal("0.06")


def test_the_device_is_the_busiest_or_the_one_named(database: Database, run: Run) -> None:
    with database.begin() as tx:
        train(tx, run, 0, device_ns=9_000, tokens_trained=9)
        train(tx, run, 1, device="cuda:X", device_ns=10, tokens_trained=10)
        devices = [make(tx, run, WORK, now=LATER, device=device).device for device in (None, "cpu", "tpu")]
    assert devices == ["cuda:X", "cpu", ""]


def test_a_quote_is_held_against_the_batch_that_is_named_after_it(database: Database, run: Run) -> None:
    # given a quote of 1 us a token, none that was followed, and training with its tag that took 1.2 us
    with database.begin() as tx:
        train(tx, run, 0, device_ns=1_000_000, tokens_trained=1_000)
        made = make(tx, run, WORK, now=LATER)
        ignored = make(tx, run, WORK, now=LATER + timedelta(seconds=1))
        tx.execute(sqlalchemy.update(tables.session).values(batch=made.id))
        train(tx, run, 1, at=LATER, device_ns=1_200_000, tokens_trained=1_000)
        # When
        found = quotes.past(tx, run.account_id, run.base_model)
        # Then
        assert [(one.quote.id, one.tokens, one.device_ns) for one in found] == [
            (ignored.id, 0, 0),
            (made.id, 1_000, 1_200_000),
        ]
        assert found[0].error is None
        expected = (1.2e-3 * 0.5 + 0.002) / (1e-3 * 0.5 + 0.002) - 1
        assert found[1].error == pytest.approx(expected, rel=1e-9)
        assert quotes.past(tx, run.account_id, "another") == []
    known = quotes.errors([*found, Past(replace(made, units=100, tokens=10), tokens=10, device_ns=0, units=40)])
    assert known is not None
    assert (known.number, known.worst) == (2, pytest.approx(-0.6))
    assert known.median == pytest.approx((0.6 + expected) / 2)
    assert quotes.errors(found[:1]) is None


def test_quotes_read_no_storage_and_all_past_ones_at_once(database: Database, run: Run) -> None:
    # given quotes of which two were followed, one of them by training of another model too
    with database.begin() as tx:
        train(tx, run, 0, device_ns=1_000_000, tokens_trained=1_000)
        made = [make(tx, run, WORK, now=LATER) for _ in range(5)]
        for seq, quote in enumerate(made, start=1):
            if seq > 2:
                continue
            tx.execute(sqlalchemy.update(tables.session).values(batch=quote.id))
            train(tx, run, seq, at=LATER, device_ns=seq, tokens_trained=10 * seq)
        other = make_run(tx, base_model="another", model_seq_id=1)
        tx.execute(sqlalchemy.update(tables.session).values(batch=made[0].id))
        train(tx, other, 0, at=LATER, device_ns=10**12, tokens_trained=1)
    statements = []

    def note(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        statements.append(statement)

    event.listen(database.engine, "before_cursor_execute", note)
    try:
        # when they are held against what became of them, in a transaction that only reads
        with database.read() as tx:
            found = {one.quote.id: (one.tokens, one.device_ns) for one in quotes.past(tx, run.account_id)}
            quotes.find_speed(tx, run.base_model, now=LATER)
    finally:
        event.remove(database.engine, "before_cursor_execute", note)
    # then
    assert found == {quote.id: (10 * seq, seq) if seq < 3 else (0, 0) for seq, quote in enumerate(made, start=1)}
    assert len([statement for statement in statements if "usage_rollup" in statement]) == 2
    assert not [statement for statement in statements if "storage_usage" in statement]


def test_more_work_than_a_row_can_hold_is_refused(database: Database, run: Run) -> None:
    with database.begin() as tx:
        # given 1 ms a token
        train(tx, run, 0, device_ns=10**9, tokens_trained=1_000)
        # then its device time is too long, or its tokens are too many
        for work in (Work(1, 2**50, 1, 1), Work(1, 2**50, 10**6, 1)):
            with pytest.raises(AmountError, match="too much work for one quote"):
                make(tx, run, work, now=LATER)

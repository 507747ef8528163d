"""Usage events: one per usage record or hour of storage, enqueued once, however late it is and whatever is rebuilt."""

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select

from billing import rate_cards, rollups, webhooks
from storage import billing_tables
from storage.clock import FrozenClock
from storage.database import Database
from storage.runs import Run
from tests.contracts.storage_kit import keep, meter, price_storage, set_clock
from tests.factories import MODEL, NOW, bill, make_account, make_operation, make_run, make_session, make_usage

CARD = """
[device_seconds]
"*" = "0.1"
"""
HOUR = timedelta(hours=1)


@pytest.fixture
def run(database: Database) -> Run:
    """A run of an account whose usage a webhook is told of."""
    with database.begin() as tx:
        rate_cards.add(tx, CARD, now=NOW - HOUR)
        run = make_run(tx, session=make_session(tx, project_id="p", api_key_id=7))
        webhooks.add(tx, run.account_id, "https://usage.test/", ["usage"], now=NOW)
        return run


@pytest.fixture
def clock(database: Database) -> Iterator[FrozenClock]:
    """Sets the database's time."""
    now = database.now
    yield set_clock(database)
    database.now = now  # type: ignore[method-assign]  # what `set_clock` has put a stand-in for


def train(database: Database, run: Run, *seqs: int) -> None:
    with database.begin() as tx:
        for seq in seqs:
            used = make_usage(device_ns=10**9 + seq, tokens_trained=seq, worker_id="w")
            bill(tx, run, make_operation(tx, run, seq), used, now=NOW + timedelta(seconds=seq))


def messages(database: Database) -> list[list[dict[str, Any]]]:
    delivery = billing_tables.webhook_delivery.c
    with database.read() as tx:
        found = tx.execute(select(delivery.body, delivery.content_type).order_by(delivery.id)).all()
    assert {row.content_type for row in found} <= {"application/cloudevents-batch+json"}
    return [json.loads(row.body) for row in found]


def test_an_event_has_what_cloudevents_and_meters_of_usage_need(database: Database, run: Run) -> None:
    # Given
    train(database, run, 3)
    # When
    rollups.roll_up(database, pass_s=60)
    # Then
    ((event,),) = messages(database)
    assert event == {
        "specversion": "1.0",
        "id": "usage-1",
        "source": "/piecework",
        "type": "piecework.usage",
        "subject": run.account_id,
        "time": (NOW + timedelta(seconds=3)).isoformat(),
        "datacontenttype": "application/json",
        "data": {
            "kind": "forward_backward",
            "base_model": MODEL,
            "device": "cpu",
            "project_id": "p",
            "api_key_id": 7,
            "session_id": run.session_id,
            "batch": None,
            "run_id": run.id,
            "device_ns": 1_000_000_003,
            "tokens_trained": 3,
            "tokens_prefilled": 0,
            "tokens_cached": 0,
            "tokens_sampled": 0,
            "byte_seconds": 0,
            "device_seconds": "1.000000003",
            "charge": "0.1000000003",
            "currency": "USD",
        },
    }


def test_each_record_is_told_of_once_whatever_is_late_repeated_or_rebuilt(database: Database, run: Run) -> None:
    # Given
    train(database, run, 1, 2, 5)
    rollups.roll_up(database, pass_s=60, batch=2)
    # When: one is committed late, all is rolled up again and again
    train(database, run, 3)
    rollups.roll_up(database, pass_s=60)
    rollups.rebuild(database)
    rollups.rebuild(database)
    train(database, run, 4)
    rollups.rebuild(database)
    # Then: in the order of recording
    ids = [event["id"] for message in messages(database) for event in message]
    assert ids == [f"usage-{number}" for number in range(1, 6)]


def test_many_events_share_messages_by_account(database: Database, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given
    monkeypatch.setattr("billing.cloud_events.EVENTS_PER_MESSAGE", 2)
    with database.begin() as tx:
        webhooks.add(tx, None, "https://all.test/", ["usage"], now=NOW)
        other = make_run(tx, session=make_session(tx, make_account(tx, "other")))
    train(database, run, 1, 2, 3)
    train(database, other, 1)
    # When
    rollups.roll_up(database, pass_s=60)
    # Then
    found = messages(database)
    assert all(len({event["subject"] for event in message}) == 1 for message in found)
    assert sorted(len(message) for message in found) == [1, 1, 1, 2, 2]
    assert sum(len(message) for message in found if message[0]["subject"] == other.account_id) == 1


def test_nothing_is_written_where_nobody_listens(database: Database) -> None:
    with database.begin() as tx:
        run = make_run(tx)
        webhooks.add(tx, run.account_id, "https://budgets.test/", ["budget"], now=NOW)
    train(database, run, 1)
    rollups.roll_up(database, pass_s=60)
    assert messages(database) == []


def test_storage_is_told_of_by_the_hour_as_it_is_metered_and_once(
    database: Database, run: Run, clock: FrozenClock
) -> None:
    # Given: a gigabyte for an hour and a half, and what others keep
    with database.begin() as tx:
        price_storage(tx, checkpoint="0.03", now=NOW - HOUR / 2)
        keep(tx, run, 10**9, since=NOW, until=NOW + 1.5 * HOUR)
        keep(tx, make_run(tx, session=make_session(tx, make_account(tx, "other"))), 1, since=NOW)
    # When
    for hours in (2, 3, 3, 4):
        meter(database, clock, at=NOW + hours * HOUR + timedelta(minutes=5))
        rollups.rebuild(database)
    # Then
    events = [event for message in messages(database) for event in message]
    assert [(event["time"], event["data"]["byte_seconds"], event["data"]["charge"]) for event in events] == [
        (NOW.isoformat(), 3600 * 10**9, "0.000041666667"),
        ((NOW + HOUR).isoformat(), 1800 * 10**9, "0.000020833333"),
    ]
    assert events[0] == {
        "specversion": "1.0",
        "id": events[0]["id"],
        "source": "/piecework",
        "type": "piecework.usage",
        "subject": run.account_id,
        "time": NOW.isoformat(),
        "datacontenttype": "application/json",
        "data": {
            "kind": "checkpoint_storage",
            "base_model": MODEL,
            "device": None,
            "project_id": "p",
            "api_key_id": 7,
            "session_id": run.session_id,
            "batch": None,
            "run_id": run.id,
            "device_ns": 0,
            "tokens_trained": 0,
            "tokens_prefilled": 0,
            "tokens_cached": 0,
            "tokens_sampled": 0,
            "byte_seconds": 3600 * 10**9,
            "device_seconds": "0",
            "charge": "0.000041666667",  # 0.03 for 720 hours
            "currency": "USD",
        },
    }
    with database.read() as tx:
        stored = billing_tables.storage_usage.c
        ids = tx.execute(select(stored.id).where(stored.run_id == run.id).order_by(stored.hour)).scalars()
        assert [event["id"] for event in events] == [f"storage-{number}" for number in ids]

"""Jobs of the bill do what there is to do, and nothing twice."""

from datetime import datetime, timedelta

import pytest
from sqlalchemy import func, select

from billing import closing, exports, invoices, ledger, reconciliation, storage_metering, webhooks
from jobs import billing_jobs
from jobs.settings import JobsSettings
from storage import billing_tables, keys, sweeper
from storage.clock import FrozenClock
from storage.open import Storage
from tests.factories import bill, make_checkpoint, make_operation, make_run
from tests.receiver import receiving


@pytest.fixture
def charged(storage: Storage) -> Storage:
    """With an operation that was charged now."""
    with storage.database.begin() as tx:
        run = make_run(tx)
        bill(tx, run, make_operation(tx, run), now=storage.database.now(tx))
    return storage


def test_a_month_is_closed_once_when_it_is_over(charged: Storage, clock: FrozenClock) -> None:
    # When
    _do("close_months", charged)
    before = _num(charged, billing_tables.invoice)
    end = closing.month_end(_now(charged))
    clock.advance((end - _now(charged) + closing.GRACE).total_seconds())
    for _ in range(3):
        _do("close_months", charged)
    # Then
    assert before == 0
    with charged.database.read() as tx:
        (invoice,) = invoices.list_invoices(tx)
        assert (invoice.period_end, ledger.total_units(tx)) == (end, invoice.units)


def test_usage_is_rolled_up(charged: Storage) -> None:
    _do("roll_up", charged)
    assert _num(charged, billing_tables.usage_rollup) == 1


def test_what_is_reconciled_is_recorded_once_an_hour(charged: Storage, clock: FrozenClock) -> None:
    nums = []
    for _ in range(3):
        for _ in range(2):
            billing_jobs.run("reconcile", charged, JobsSettings())
        nums.append(_num(charged, billing_tables.reconciliation))
        clock.advance(reconciliation.EVERY.total_seconds())
    assert nums == [1, 2, 3]


def test_storage_is_metered_by_the_hour(storage: Storage, clock: FrozenClock) -> None:
    with storage.database.begin() as tx:
        make_checkpoint(tx, make_run(tx), now=storage.database.now(tx))
    nums = []
    for _ in range(3):
        _do("meter_storage", storage)
        nums.append(_num(storage, billing_tables.storage_usage))
        clock.advance(3600)
    assert nums == [0, 0, 1]


def test_a_job_of_another_version_is_done(storage: Storage) -> None:
    assert billing_jobs.run("fly", storage, JobsSettings())


def _do(job: str, storage: Storage) -> None:
    """All of a job, in as many parts as a slow machine makes of it."""
    assert any(billing_jobs.run(job, storage, JobsSettings()) for _ in range(20))


def _num(storage: Storage, table: object) -> int:
    with storage.database.read() as tx:
        return int(tx.execute(select(func.count()).select_from(table)).scalar_one())  # type: ignore[arg-type]


def _now(storage: Storage) -> datetime:
    with storage.database.read() as tx:
        return storage.database.now(tx)


def test_a_day_is_exported_once_when_it_is_over_if_settings_say_so(
    charged: Storage, clock: FrozenClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    def exported() -> list[str]:
        billing_jobs.run("export_day", charged, JobsSettings())
        return [one.key for one in charged.objects.list("exports/")]

    clock.advance((exports.SETTLED + timedelta(days=1)).total_seconds())
    assert exported() == []
    # When
    monkeypatch.setenv("PIECEWORK_EXPORT_DAILY", "csv")
    first = [exported() for _ in range(3)]
    clock.advance(timedelta(days=1).total_seconds())
    second = exported()
    # Then
    assert [len(keys) for keys in first] == [1, 1, 1]
    assert len(second) == 2
    assert [charged.objects.get(key).count(b"\n") for key in first[0]] == [2]
    # And: it is deleted when it has expired
    clock.advance(timedelta(days=40).total_seconds())
    sweeper.sweep(charged.database, charged.objects, result_retention_s=1e9, sampling_session_idle_s=1e9, pass_s=60)
    assert list(charged.objects.list("exports/")) == []


def test_days_that_no_scheduler_has_seen_are_exported_when_one_is_back(
    charged: Storage, clock: FrozenClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    def days() -> list[str]:
        _do("export_day", charged)
        names = (str(keys.parse(one.key).filename) for one in charged.objects.list("exports/"))
        return sorted(name.removeprefix("usage-all-")[:10] for name in names)

    monkeypatch.setenv("PIECEWORK_EXPORT_DAILY", "csv")
    clock.advance((exports.SETTLED + timedelta(days=1)).total_seconds())
    today = _now(charged)
    assert days() == [f"{today - timedelta(days=1):%Y-%m-%d}"]
    # When
    clock.advance(timedelta(days=3).total_seconds())
    # Then: each once
    for _ in range(2):
        assert days() == [f"{today + timedelta(days=number):%Y-%m-%d}" for number in (-1, 0, 1, 2)]


def test_a_day_is_exported_when_the_storage_of_all_its_hours_is_metered(
    charged: Storage, clock: FrozenClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a day that ended an hour ago, and what was kept in it
    with charged.database.begin() as tx:
        make_checkpoint(tx, make_run(tx), now=charged.database.now(tx))
    monkeypatch.setenv("PIECEWORK_EXPORT_DAILY", "csv")
    clock.advance((timedelta(days=1) + exports.SETTLED).total_seconds())
    # When: a part of an hour is metered each time
    nums, is_metered = [], False
    while not is_metered:
        _do("export_day", charged)
        nums.append(len(list(charged.objects.list("exports/"))))
        is_metered = storage_metering.meter(charged.database, pass_s=0)
    # Then
    assert len(nums) > 24
    assert nums == [0] * (len(nums) - 1) + [1]
    (export,) = charged.objects.list("exports/")
    assert charged.objects.get(export.key).count(b"checkpoint_storage") == 24


def test_webhooks_are_told_by_a_job(charged: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given
    monkeypatch.setenv("PIECEWORK_WEBHOOK_PRIVATE_ADDRESSES", "true")
    with receiving() as receiver:
        with charged.database.begin() as tx:
            webhooks.add(tx, None, f"{receiver.url}/ok", ["usage"], now=charged.database.now(tx))
        # When
        for job in ("roll_up", "deliver_webhooks", "deliver_webhooks", "forget_deliveries"):
            _do(job, charged)
        # Then
        (message,) = receiver.received
        assert message.headers["content-type"] == "application/cloudevents-batch+json"

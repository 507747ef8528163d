"""What usage costs so far, told over HTTP: by any filter, in the listing of runs and with the results of steps."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal

import pytest
from sqlalchemy import insert
from tinker.types import BillingUsageResponse, CurrentCheckpointStorageUsageResponse, TrainingRun

from billing import ledger, rate_cards, rollups, storage_metering
from billing.money import from_units
from billing.usage_totals import HOUR, hour_of
from jobs import operations
from jobs.operations import OptimStepOutcome
from storage import journal, runs, tables
from storage.clock import FrozenClock
from storage.open import Storage
from storage.payloads import Stored
from tests.api.conftest import Account
from tests.factories import bill, make_checkpoint, make_operation, make_usage


def use(storage: Storage, run_id: str, seq: int, kind: str = "forward_backward") -> str:
    """Complete an operation of a run and charge it; its request id."""
    outcome = operations.encode(OptimStepOutcome({"grad_norm": 1.5}))
    with storage.database.begin() as tx:
        now = storage.database.now(tx)
        run = runs.get_run(tx, run_id)
        operation = make_operation(tx, run, seq, kind)
        bill(tx, run, operation, make_usage(device_ns=3 * 10**9, tokens_trained=1_000), now=now)
        journal.complete(tx, operation, Stored(inline=outcome, size_bytes=len(outcome)), worker_id="w", now=now)
        return operation.request_id


def charged(storage: Storage) -> Decimal:
    """The sum of the ledger."""
    with storage.database.read() as tx:
        return from_units(ledger.total_units(tx))


@pytest.mark.parametrize("rolled_up", [False, True])
def test_cost_is_told_by_every_dimension(alice: Account, storage: Storage, *, rolled_up: bool) -> None:
    # Given
    run_id = alice.run()
    use(storage, run_id, 1)
    if rolled_up:
        rollups.roll_up(storage.database, pass_s=60)
    with storage.database.read() as tx:
        run = runs.get_run(tx, run_id)
        session = runs.get_session(tx, alice.id, run.session_id)
    wanted = {"run": run_id, "session": session.id, "key": session.api_key_id}
    for name, value in wanted.items():
        # When
        found = alice.get("cost", params={name: value}).json()
        other = alice.get("cost", params={name: 999_999}).json()
        # Then
        assert Decimal(found["total"]["cost"]) == charged(storage) > 0
        assert other["rows"] == []


def test_another_account_sees_none_of_it(make_account: Callable[[str], Account], storage: Storage) -> None:
    alice, bob = make_account("one"), make_account("two")
    run_id = alice.run()
    use(storage, run_id, 1)
    assert bob.get("cost", params={"run": run_id}).json()["rows"] == []


def test_runs_are_listed_with_what_they_cost(alice: Account, storage: Storage) -> None:
    # Given
    run_id = alice.run()
    use(storage, run_id, 1)
    # When
    (listed,) = alice.get("training_runs").json()["training_runs"]
    one = alice.get(f"training_runs/{run_id}").json()
    # Then
    assert Decimal(listed["cost"]) == Decimal(one["cost"]) == charged(storage)
    assert TrainingRun.model_validate(listed).training_run_id == run_id


def test_the_result_of_a_step_tells_what_the_run_has_cost_and_does_not_keep_it(
    alice: Account, storage: Storage
) -> None:
    # Given
    request_id = use(storage, alice.run(), 1, "optim_step")
    # When
    answer = alice.post("retrieve_future", json={"request_id": request_id}).json()
    # Then
    assert answer["metrics"] == {"grad_norm": 1.5, "cost_usd": float(charged(storage))}
    with storage.database.read() as tx:
        stored = storage.payloads.get(journal.get_operation(tx, request_id).outcome)
    assert operations.decode(stored) == OptimStepOutcome({"grad_norm": 1.5})


def window(storage: Storage, *, hours: int = 1) -> dict[str, str]:
    """The hour under way and some before it, as the SDK asks for them."""
    with storage.database.read() as tx:
        hour = hour_of(storage.database.now(tx))
    return {"starting_on": (hour - hours * HOUR).isoformat(), "ending_before": (hour + HOUR).isoformat()}


@pytest.mark.parametrize("rolled_up", [False, True])
def test_usage_events_agree_with_cost_and_the_ledger(alice: Account, storage: Storage, *, rolled_up: bool) -> None:
    # Given
    run_id = alice.run()
    for seq, kind in enumerate(["forward_backward", "optim_step", "save_state", "forward"], start=1):
        use(storage, run_id, seq, kind)
    if rolled_up:
        rollups.roll_up(storage.database, pass_s=60)
    # When
    answer = alice.get("billing/usage/events", params=window(storage))
    told = BillingUsageResponse.model_validate(answer.json())
    # Then
    costs = [Decimal(str(event.estimated_cost_usd)) for event in told.data]
    assert sum(costs) == Decimal(alice.get("cost").json()["total"]["cost"]) == charged(storage)
    infos = {event.event_info.type: event.event_info for event in told.data}
    assert infos["training"].token_count == 4_000 - 1_000  # type: ignore[union-attr]
    assert infos["checkpoint"].count == 1  # type: ignore[union-attr]
    assert set(told.sessions) == {event.session_id for event in told.data}


@pytest.mark.parametrize(
    ("starting_on", "ending_before", "why"),
    [
        ("2026-01-01T00:30:00Z", "2026-01-01T02:00:00Z", "whole hours"),
        ("2026-01-01T00:00:00Z", "2026-01-16T00:00:00Z", "at most 14 days"),
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z", "must come after"),
        ("2999-01-01T00:00:00Z", "2999-01-02T00:00:00Z", "future"),
    ],
)
def test_a_window_that_makes_no_sense_is_refused(
    alice: Account, starting_on: str, ending_before: str, why: str
) -> None:
    answer = alice.get("billing/usage/events", params={"starting_on": starting_on, "ending_before": ending_before})
    assert answer.status_code == 400
    assert why in answer.text


def test_checkpoint_storage_is_told_by_project(alice: Account, storage: Storage) -> None:
    # Given
    run_id = alice.run()
    with storage.database.begin() as tx:
        run = runs.get_run(tx, run_id)
        for name in ("one", "two"):
            make_checkpoint(tx, run, name, now=storage.database.now(tx))
    # When
    answer = alice.get("billing/usage/checkpoints/current").json()
    other = alice.get("billing/usage/checkpoints/current", params={"project_id": "another"}).json()
    # Then
    (item,) = CurrentCheckpointStorageUsageResponse.model_validate(answer).data
    assert (item.checkpoint_count, item.size_bytes, item.project_id) == (2, 20, None)
    rate = answer["effective_rate_usd_per_gigabyte_month"]
    assert item.estimated_monthly_cost_usd == pytest.approx(rate * 20 / 10**9)
    assert other["data"] == []


def test_storage_is_told_alike_by_cost_events_and_what_is_kept(
    alice: Account, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a checkpoint that is kept for an hour, and the state of its run
    run_id = alice.run()
    clock = FrozenClock(hour_of(storage.database.clock.now()) + HOUR)
    monkeypatch.setattr(storage.database, "clock", clock)
    with storage.database.begin() as tx:
        now = clock.now()
        rate_cards.add(tx, '[gigabyte_months]\ncheckpoint = "900000"', now=now, lead_s=0)
        make_checkpoint(tx, runs.get_run(tx, run_id), now=now)
        state = {"run_id": run_id, "seq": 1, "object_key": "s", "size_bytes": 10**9, "sha256": "", "created_at": now}
        tx.execute(insert(tables.snapshot).values(**state))
    clock.advance(2 * 3600)
    storage_metering.meter(storage.database, pass_s=60)
    # When
    (kept,) = alice.get("billing/usage/checkpoints/current").json()["data"]
    told = BillingUsageResponse.model_validate(
        alice.get("billing/usage/events", params=window(storage, hours=3)).json()
    )
    rows = {row["kind"]: row for row in alice.get("cost", params={"run": run_id}).json()["rows"]}
    (listed,) = alice.get("training_runs").json()["training_runs"]
    # Then: 10 bytes for an hour, of which a month has 720
    assert Decimal(rows["checkpoint_storage"]["cost"]) == charged(storage) == Decimal(listed["cost"]) > 0
    assert rows["checkpoint_storage"]["byte_seconds"] == kept["size_bytes"] * 3600
    assert float(charged(storage)) * 720 == pytest.approx(kept["estimated_monthly_cost_usd"])
    assert rows["state_storage"]["cost"] == "0"
    paid, free = sorted((event for event in told.data), key=lambda event: event.event_info.free)  # type: ignore[union-attr]
    assert (paid.effective_rate_usd_per_gigabyte_month, paid.event_info.gigabyte_hours) == (900_000, 1e-8)  # type: ignore[union-attr]
    assert paid.estimated_cost_usd == float(charged(storage))
    assert (free.estimated_cost_usd, free.event_info.gigabyte_hours, free.event_info.free) == (0, 1, True)  # type: ignore[union-attr]

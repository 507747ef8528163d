"""What usage costs so far, told over HTTP: by any filter, in the listing of runs and with the results of steps."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal

import pytest
from tinker.types import TrainingRun

from billing import ledger, rollups
from billing.money import from_units
from jobs import operations
from jobs.operations import OptimStepOutcome
from storage import journal, runs
from storage.open import Storage
from storage.payloads import Stored
from tests.api.conftest import Account
from tests.factories import bill, make_operation, make_usage


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

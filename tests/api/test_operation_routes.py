"""Who comes back finds what became of everything that was accepted, with nothing but the account's key."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import pytest

from billing.usage import Usage
from jobs.operations import ModelCreated, OptimStepOutcome, Outcome
from storage import journal, runs
from storage.open import Storage
from tests.api.conftest import Account
from tests.api.test_sampling_routes import open_sampler, sample_body
from tests.factories import bill


def step(account: Account, run: str, seq: int, learning_rate: float = 1e-3) -> str:
    body = {"model_id": run, "seq_id": seq, "adam_params": {"learning_rate": learning_rate}, "type": "optim_step"}
    return str(account.post("optim_step", body).json()["request_id"])


@pytest.fixture
def run(alice: Account, complete: Callable[[str, Outcome], None], storage: Storage) -> str:
    """Operations 0 and 1 are completed, 2 has failed, 3 waits."""
    run_id = alice.run()
    for seq, rate in ((1, 1e-3), (2, -1.0), (3, 1e-3)):
        step(alice, run_id, seq, rate)
    complete(f"{run_id}:0", ModelCreated(run_id))
    complete(f"{run_id}:1", OptimStepOutcome({"grad_norm:mean": 2.5}))
    with storage.database.begin() as tx:
        operation = journal.get_operation(tx, f"{run_id}:1")
        used = Usage("cpu", 1_500_000_000, 1, "w", tokens_trained=7)
        bill(tx, runs.get_run(tx, run_id), operation, used, now=storage.database.now(tx))
    return run_id


def test_a_runs_operations_are_listed_in_order_with_what_they_used(alice: Account, run: str) -> None:
    answer = alice.get(f"training_runs/{run}/operations").json()
    listed = answer["operations"]
    assert answer["next_after"] is None
    assert [(row["seq"], row["kind"], row["status"]) for row in listed] == [
        (0, "create_model", "completed"),
        (1, "optim_step", "completed"),
        (2, "optim_step", "failed"),
        (3, "optim_step", "queued"),
    ]
    assert (listed[1]["tokens_trained"], listed[1]["device_seconds"]) == (7, "1.5")
    assert (listed[3]["device_seconds"], listed[3]["finished_at"]) == (None, None)
    assert "learning_rate" in listed[2]["error"]
    assert datetime.fromisoformat(listed[1]["finished_at"]) >= datetime.fromisoformat(listed[1]["accepted_at"])


def test_a_long_list_is_read_page_by_page(alice: Account, run: str) -> None:
    seqs, after = [], -1
    while after is not None:
        page = alice.get(f"training_runs/{run}/operations", params={"after": after, "limit": 3}).json()
        seqs.append([row["seq"] for row in page["operations"]])
        after = page["next_after"]
    assert seqs == [[0, 1, 2], [3]]
    assert alice.get(f"training_runs/{run}/operations", params={"limit": 1001}).status_code == 422


def test_results_are_fetched_without_the_sdk(alice: Account, run: str) -> None:
    assert alice.get(f"operations/{run}:1").json()["status"] == "completed"
    assert alice.get(f"operations/{run}:0/result").json() == {"model_id": run, "type": "create_model"}
    step = alice.get(f"operations/{run}:1/result").json()
    assert step == {"metrics": {"grad_norm:mean": 2.5, "cost_usd": 3e-05}}
    failure = alice.get(f"operations/{run}:2/result").json()
    assert (failure["category"], "learning_rate" in failure["error"]) == ("user", True)
    waits = alice.get(f"operations/{run}:3/result")
    assert (waits.status_code, waits.json()) == (202, {"request_id": f"{run}:3", "status": "queued"})


def test_a_sample_is_looked_up_by_its_request_id(alice: Account) -> None:
    sampler = str(open_sampler(alice).json()["sampling_session_id"])
    request_id = alice.post("asample", sample_body(sampler)).json()["request_id"]
    row = alice.get(f"operations/{request_id}").json()
    assert (row["kind"], row["status"], row["sampling_session_id"]) == ("sample", "queued", sampler)


def test_a_result_that_was_kept_long_enough_is_410(alice: Account, run: str, storage: Storage) -> None:
    with storage.database.begin() as tx:
        journal.expire_outcomes(tx, [journal.get_operation(tx, f"{run}:1").id])
    assert alice.get(f"operations/{run}:1/result").status_code == 410
    assert alice.get(f"operations/{run}:1").json()["result_expired"] is True


def test_another_account_finds_nothing(bob: Account, run: str) -> None:
    paths = (f"training_runs/{run}/operations", f"operations/{run}:1", f"operations/{run}:1/result")
    for path in paths:
        theirs, nobodys = bob.get(path), bob.get(path.replace(run, "nobody:train:0"))
        assert (theirs.status_code, nobodys.status_code) == (404, 404)
        assert theirs.json()["detail"].replace(run, "nobody:train:0") == nobodys.json()["detail"]

"""Too much that waits is answered 429, which the SDK waits out; what was accepted before is never refused."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.operations import OptimStepOutcome
from jobs.settings import JobsSettings
from storage import journal
from storage.open import Storage
from tests.api.conftest import MODEL, Account
from tests.api.test_sampling_routes import open_sampler, sample_body
from tests.api.test_training_routes import PROTO, message


@pytest.fixture
def jobs_settings() -> JobsSettings:
    """Two operations of an account may wait, four of training."""
    return JobsSettings(queued_max_per_account=2, queued_training_factor=2)


def sample(account: Account, sampler: str, seq: int) -> Any:
    return account.post("asample", sample_body(sampler, seq_id=seq))


def step(account: Account, run: str, seq: int) -> Any:
    body = {"model_id": run, "seq_id": seq, "adam_params": {"learning_rate": 1e-3}, "type": "optim_step"}
    return account.post("optim_step", body)


def test_samples_beyond_the_limit_are_429_and_those_accepted_before_are_not(alice: Account) -> None:
    # given: as many as may wait
    sampler = str(open_sampler(alice).json()["sampling_session_id"])
    accepted = [sample(alice, sampler, seq).json() for seq in range(2)]
    # when
    refused = sample(alice, sampler, 2)
    # then
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert "this account has 2 operations waiting for execution, and the limit is 2" in refused.json()["detail"]
    assert [sample(alice, sampler, seq).json() for seq in range(2)] == accepted


def test_training_goes_on_to_the_second_bound(alice: Account) -> None:
    # given: a run, whose creation waits, and three operations of each kind of body
    run = alice.run()
    accepted = [
        alice.post("forward_backward", content=message(run, 1).SerializeToString(), headers=PROTO),
        step(alice, run, 2),
        alice.post("save_weights", {"model_id": run, "seq_id": 3, "path": "a", "type": "save_weights"}),
    ]
    assert [answer.status_code for answer in accepted] == [200] * 3
    # when
    refused = step(alice, run, 4)
    # then
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
    assert "the limit is 4" in refused.json()["detail"]
    # and: what was accepted is found by its seq, whatever the limit
    again = alice.post("forward_backward", content=message(run, 1).SerializeToString(), headers=PROTO)
    assert again.json() == accepted[0].json()
    assert step(alice, run, 2).json() == accepted[1].json()


def test_a_refused_seq_leaves_nothing_and_is_taken_when_there_is_room(
    alice: Account, storage: Storage, complete: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    monkeypatch.setattr("jobs.backlog.COUNT_EVERY_S", 0.0)
    monkeypatch.setattr("jobs.backlog.COUNT_SHARE_MAX", 1e9)
    run = alice.run()
    accepted = [step(alice, run, seq).json()["request_id"] for seq in (1, 2, 3)]
    assert step(alice, run, 4).status_code == 429
    with storage.database.read() as tx:
        assert journal.find_operation(tx, f"{run}:4") is None
    # when
    complete(accepted[0], OptimStepOutcome({}))
    # then
    assert step(alice, run, 4).json()["request_id"] == f"{run}:4"


def test_what_makes_no_sense_is_told_through_the_future_however_much_waits(alice: Account) -> None:
    run = alice.run()
    for seq in (1, 2, 3):
        step(alice, run, seq)
    body = {"model_id": run, "seq_id": 4, "adam_params": {"learning_rate": -1}, "type": "optim_step"}
    answer = alice.post("optim_step", body)
    assert answer.status_code == 200
    assert "learning_rate" in alice.retrieve(answer.json()["request_id"]).json()["error"]


def test_one_account_that_is_full_is_no_other_accounts_concern(alice: Account, bob: Account) -> None:
    # given
    run = alice.run()
    for seq in (1, 2, 3):
        step(alice, run, seq)
    assert step(alice, run, 4).status_code == 429
    # then
    assert step(bob, bob.run(), 1).status_code == 200


def test_runs_are_refused_too_but_sessions_and_samplers_are_not(alice: Account) -> None:
    # given: as much as may wait
    session = alice.session()
    for number in range(4):
        alice.run(session, model_seq_id=number)
    # when
    body = {"session_id": session, "model_seq_id": 4, "base_model": MODEL, "type": "create_model"}
    refused = alice.post("create_model", body)
    # then: the SDK repeats it ten times
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "30")
    assert alice.run(session, model_seq_id=3) == f"{session}:train:3"
    # and: where the SDK would not wait, nothing is refused
    other = alice.session()
    assert open_sampler(alice, other).status_code == 200
    assert alice.post("client/config", {"sdk_version": "0.38.0"}).status_code == 200
    assert alice.post("session_heartbeat", {"session_id": other}).status_code == 200

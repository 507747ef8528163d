"""Over a spent cap only what costs something is answered 402: the SDK does not wait anywhere else."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import update

from billing import budgets
from billing.budgets import Scope
from storage import tables
from storage.open import Storage
from tests.api.conftest import MODEL, Account
from tests.api.test_sampling_routes import open_sampler, sample_body
from tests.api.test_training_routes import PROTO, message


@pytest.fixture
def spent(alice: Account, storage: Storage) -> str:
    """A run of an account whose cap is spent."""
    run = alice.run()
    with storage.database.begin() as tx:
        budgets.add(tx, alice.id, Scope.ACCOUNT, alice.id, cap=0, now=storage.database.now(tx))
    return run


def test_training_and_sampling_are_answered_402_with_the_cap_and_what_to_do(alice: Account, spent: str) -> None:
    sampling = open_sampler(alice).json()["sampling_session_id"]
    step = {"model_id": spent, "seq_id": 2, "type": "optim_step", "adam_params": {"learning_rate": 0.1}}
    answers = [
        alice.post("forward_backward", content=message(spent, 1).SerializeToString(), headers=PROTO),
        alice.post("optim_step", step),
        alice.post("asample", sample_body(sampling)),
    ]
    assert [answer.status_code for answer in answers] == [402] * 3
    for answer in answers:
        assert f"account {alice.id}" in answer.json()["detail"]
        assert "top the account up" in answer.json()["detail"]


def test_what_is_advised_is_what_helps(alice: Account, storage: Storage) -> None:
    # given a cap on a run, which no top-up reaches, and that no period ends
    run = alice.run()
    with storage.database.begin() as tx:
        budgets.add(tx, alice.id, Scope.RUN, run, cap=0, now=storage.database.now(tx))
    # when
    answer = alice.post("forward_backward", content=message(run, 1).SerializeToString(), headers=PROTO)
    # then
    assert answer.status_code == 402
    assert answer.json()["detail"].endswith("until there is: raise the cap")


def test_a_misspelt_filter_of_the_cost_is_refused(alice: Account) -> None:
    assert alice.get("cost", params={"session": "x"}).status_code == 200
    answer = alice.get("cost", params={"session_id": "x"})
    assert answer.status_code == 422
    assert "session_id" in answer.json()["detail"]


def test_whatever_costs_nothing_is_never_answered_402(alice: Account, spent: str) -> None:
    session = alice.session()
    saved = {"model_id": spent, "path": "kept", "seq_id": 1, "type": "save_weights"}
    requests: list[tuple[str, dict[str, Any]]] = [
        ("client/config", {"sdk_version": "0.38.0"}),
        ("client/dynamic_config", {"sdk_version": "0.38.0"}),
        ("create_session", {"sdk_version": "0.38.0"}),
        ("session_heartbeat", {"session_id": session}),
        ("create_model", {"session_id": session, "model_seq_id": 0, "base_model": MODEL}),
        ("create_sampling_session", {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}),
        ("get_info", {"model_id": spent}),
        ("save_weights", saved),
        ("save_weights_for_sampler", {**saved, "seq_id": 2, "type": "save_weights_for_sampler"}),
        ("load_weights", {"model_id": spent, "path": f"tinker://{spent}/weights/kept", "seq_id": 3}),
        ("cancel_future", {"request_id": f"{spent}:0"}),
        ("telemetry", {"events": []}),
    ]
    assert {path: alice.post(path, body).status_code for path, body in requests} == {path: 200 for path, _ in requests}
    for path in ("get_server_capabilities", "training_runs", "cost", "budgets", "checkpoints"):
        assert alice.get(path).status_code == 200


def test_what_waits_behind_a_refused_place_says_so(alice: Account, spent: str) -> None:
    # given a save that was accepted behind a refused forward_backward
    alice.post("forward_backward", content=message(spent, 1).SerializeToString(), headers=PROTO)
    saved = alice.post("save_weights", {"model_id": spent, "path": "kept", "seq_id": 2, "type": "save_weights"})
    # when
    polled = alice.retrieve(saved.json()["request_id"])
    # then
    assert (polled.status_code, polled.json()["queue_state"]) == (408, "paused_capacity")
    assert polled.json()["queue_state_reason"].startswith("budget: seq_id 1 of this run waits for room")


def test_what_a_spent_cap_pauses_says_so(alice: Account, storage: Storage) -> None:
    # given work that was accepted before the cap
    run = alice.run()
    sampling = open_sampler(alice).json()["sampling_session_id"]
    trained = alice.post("forward_backward", content=message(run, 1).SerializeToString(), headers=PROTO)
    drawn = alice.post("asample", sample_body(sampling))
    with storage.database.begin() as tx:
        tx.execute(update(tables.run).where(tables.run.c.id == run).values(state_seq=0))  # it was made
        budgets.add(tx, alice.id, Scope.ACCOUNT, alice.id, cap=0, now=storage.database.now(tx))
    # when, then
    for accepted in (trained, drawn):
        polled = alice.retrieve(accepted.json()["request_id"])
        assert (polled.status_code, polled.json()["queue_state"]) == (408, "paused_capacity")
        assert polled.json()["queue_state_reason"].startswith("budget: budget 1 (account")

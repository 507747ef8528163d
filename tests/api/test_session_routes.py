"""Sessions live by heartbeats, end by finishing, and are found by their own account."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.api.conftest import CONTEXT, MODEL, Account


def test_a_session_is_opened_once_per_idempotency_key(alice: Account, bob: Account) -> None:
    def open_session(account: Account, key: str) -> str:
        body = {"tags": ["a"], "user_metadata": {}, "sdk_version": "0.38.0"}
        headers = {"X-Idempotency-Key": key}
        return str(account.post("create_session", body, headers=headers).json()["session_id"])

    first = open_session(alice, "k")
    assert open_session(alice, "k") == first
    assert len({first, open_session(alice, "l"), open_session(bob, "k")}) == 3


@pytest.mark.parametrize(
    "asked", [{"tags": ["batch:" + "b" * 129]}, {"tags": ["a", "batch:"]}, {"project_id": "p" * 65}, {"project_id": ""}]
)
def test_a_batch_or_project_that_could_not_be_charged_is_refused(alice: Account, asked: dict[str, Any]) -> None:
    answer = alice.post("create_session", {"sdk_version": "0.38.0", **asked})
    assert answer.status_code == 400
    assert next(iter(asked)) in answer.json()["detail"]
    # and: the longest names are taken as they are
    longest = {"sdk_version": "0.38.0", "tags": ["batch:" + "b" * 128], "project_id": "p" * 64}
    assert alice.post("create_session", longest).status_code == 200


def test_heartbeats_are_answered_until_the_session_is_finished(alice: Account) -> None:
    session = alice.session()
    beat = {"session_id": session, "type": "session_heartbeat"}
    assert alice.post("session_heartbeat", beat).status_code == 200
    finish = {"reason": {"type": "errored"}, "detail": "x"}
    assert alice.post(f"sessions/{session}/finish", finish).status_code == 204
    assert alice.post("session_heartbeat", beat).status_code == 410
    # and: finishing again changes nothing
    assert alice.post(f"sessions/{session}/finish", {"reason": {"type": "success"}}).status_code == 204
    found = alice.post("sessions/search", {"session_id": session}).json()["sessions"]
    assert found[0]["status"] == {"type": "client_finished", "reason": {"type": "errored"}, "detail": "x"}


def test_sessions_are_listed_to_their_account_only(alice: Account, bob: Account) -> None:
    session = alice.session()
    run = alice.run(session)
    assert alice.get("sessions").json() == {"sessions": [session]}
    assert bob.get("sessions").json() == {"sessions": []}
    found = alice.get(f"sessions/{session}").json()
    assert (found["training_run_ids"], found["sampler_ids"]) == ([run], [])
    for method, path in [("GET", f"sessions/{session}"), ("POST", f"sessions/{session}/finish")]:
        assert bob.request(method, path, json={}).status_code == 404
    assert bob.post("session_heartbeat", {"session_id": session}).status_code == 404
    assert bob.post("sessions/search", {"session_id": session}).json()["sessions"] == []


def named(account: Account, name: str, **metadata: str) -> str:
    body = {"display_name": name, "user_metadata": metadata, "sdk_version": "0.38.0"}
    return str(account.post("create_session", body).json()["session_id"])


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, ["c", "b", "a"]),
        ({"display_name": "RUN first"}, ["a"]),
        ({"display_name": "run"}, ["c", "b", "a"]),
        ({"user_metadata": {"team": "x"}}, ["b", "a"]),
        ({"statuses": [{"type": "active"}]}, ["c", "a"]),
        ({"statuses": [{"type": "client_finished", "reasons": ["success"]}]}, ["b"]),
        ({"statuses": [{"type": "failed"}]}, []),
        ({"owner": {"type": "user", "owner_urns": ["somebody"]}}, []),
    ],
)
def test_search_combines_its_conditions(query: dict[str, Any], expected: list[str], alice: Account) -> None:
    ids = {
        "a": named(alice, "first run", team="x"),
        "b": named(alice, "second run", team="x"),
        "c": named(alice, "third run"),
    }
    alice.post(f"sessions/{ids['b']}/finish", {"reason": {"type": "success"}, "detail": None})
    found = [summary["session_id"] for summary in alice.post("sessions/search", query).json()["sessions"]]
    assert found == [ids[name] for name in expected]


def test_search_goes_on_behind_its_cursor(alice: Account) -> None:
    ids = [named(alice, f"s{i}") for i in range(5)]
    seen: list[str] = []
    cursor: Any = None
    for _ in range(3):
        page = alice.post("sessions/search", {"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [summary["session_id"] for summary in page["sessions"]]
        cursor = page["next_cursor"]
    assert seen == ids[::-1]
    assert cursor is None


class TestService:
    def test_config_switches_parallel_chunks_off(self, alice: Account) -> None:
        assert alice.post("client/config", {"sdk_version": "0.38.0"}).json()["parallel_fwdbwd_chunks"] is False
        assert alice.post("client/dynamic_config", {"sdk_version": "0.38.0"}).status_code == 200

    def test_config_lets_the_sdk_wait_thirty_days_under_a_cap(self, alice: Account) -> None:
        config = alice.post("client/config", {"sdk_version": "0.38.0"}).json()
        assert config["billing_exception_max_pause_duration_sec"] == 2_592_000

    def test_capabilities_list_the_base_models(self, alice: Account) -> None:
        model = {"model_name": MODEL, "max_context_length": CONTEXT, "trainable": True, "sampleable": True}
        assert alice.get("get_server_capabilities").json() == {"supported_models": [model]}

    def test_telemetry_is_accepted_in_the_one_form_that_the_client_takes(self, alice: Account) -> None:
        assert alice.post("telemetry", {"events": []}).json() == {"status": "accepted"}
        assert alice.post("telemetry", content=b"x" * 100_000).json() == {"status": "accepted"}

    def test_health_needs_no_key(self, alice: Account) -> None:
        assert alice.http.get("/api/v1/healthz").json()["status"] == "ok"

    def test_unknown_routes_and_methods_are_answered_in_json(self, alice: Account) -> None:
        assert alice.get("nothing").json() == {"detail": "Not Found"}
        assert alice.get("create_model").status_code == 405

    def test_a_key_can_be_looked_at_and_ended(self, alice: Account) -> None:
        mine = alice.get("auth/apikey/me").json()
        assert mine["details"]["org_details"] == {"name": "alice"}
        assert alice.secret not in str(mine)
        assert alice.request("DELETE", "auth/apikey/me").status_code == 204
        assert alice.get("auth/apikey/me").status_code == 401


class TestRuns:
    def test_are_listed_newest_first_to_their_account_only(self, alice: Account, bob: Account) -> None:
        session = alice.session()
        ids = [alice.run(session, model_seq_id=i) for i in range(3)]
        listed = alice.get("training_runs?limit=2&offset=0").json()
        assert [run["training_run_id"] for run in listed["training_runs"]] == ids[:0:-1]
        assert listed["cursor"] == {"offset": 0, "limit": 2, "total_count": 3}
        assert bob.get("training_runs").json()["training_runs"] == []
        assert alice.get(f"training_runs/{ids[0]}").json()["lora_rank"] == 32
        assert bob.get(f"training_runs/{ids[0]}").status_code == 404

    def test_bad_pages_are_refused_in_words(self, alice: Account) -> None:
        answer = alice.get("training_runs?limit=0")
        assert answer.status_code == 422
        assert "limit" in answer.json()["detail"]


def test_cost_is_empty_before_anything_ran(alice: Account) -> None:
    report = alice.get("cost").json()
    assert report["rows"] == []
    assert report["total"]["cost"] == "0"


def test_the_api_starts_without_torch() -> None:
    program = (
        "import sys, api.app, api.__main__; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"

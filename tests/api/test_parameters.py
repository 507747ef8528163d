"""Times and numbers that no row holds are answered with what to change, not with a 500."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from api import errors
from tests.api.conftest import Account

FAR_AWAY = ("0001-01-01T00:00:00+14:00", "9999-12-31T23:30:00Z", "9999-12-31T23:59:59-12:00", "1969-12-31T23:59:59Z")
NEAR = ("1970-01-01T00:00:00+14:00", "9998-12-31T23:30:00-12:00")


@pytest.mark.parametrize("moment", FAR_AWAY)
def test_a_time_that_cannot_be_reckoned_with_is_refused_by_name(alice: Account, moment: str) -> None:
    window = ("2026-01-01T00:00:00Z", moment), (moment, "2026-01-01T00:00:00Z")
    asked: list[tuple[str, dict[str, Any]]] = [("cost", {"since": moment})]
    asked += [
        ("billing/usage/events", dict(zip(("starting_on", "ending_before"), each, strict=True))) for each in window
    ]
    for path, parameters in asked:
        # when
        answer = alice.get(path, params=parameters)
        # then
        assert (answer.status_code, "in the years 1970 to 9998" in answer.json()["detail"]) == (422, True), path


@pytest.mark.parametrize("moment", NEAR)
def test_the_first_and_the_last_time_are_understood(alice: Account, moment: str) -> None:
    assert alice.get("cost", params={"since": moment}).json()["rows"] == []


@pytest.mark.parametrize("moment", [*FAR_AWAY, "2026-01-01T00:00:00"])
def test_a_search_of_sessions_goes_on_from_no_such_time(alice: Account, moment: str) -> None:
    # given a session to be compared with the time
    alice.session()
    # when
    answer = alice.post("sessions/search", {"cursor": {"last_created_at": moment, "last_session_id": "x"}})
    # then
    assert (answer.status_code, "last_created_at" in answer.json()["detail"]) == (400, True)


@pytest.mark.parametrize("listed", ["invoices", "training_runs", "sessions", "checkpoints"])
def test_an_offset_that_the_database_cannot_count_to_is_refused(alice: Account, listed: str) -> None:
    answers = [alice.get(listed, params={"offset": offset}) for offset in (2**62, 2**62 + 1, 10**20, -1)]
    assert [answer.status_code for answer in answers] == [200, 422, 422, 422]
    assert "offset" in answers[1].json()["detail"]


def test_what_overflows_further_in_is_the_requests_fault() -> None:
    # given a route that reckons with what it was given
    app = FastAPI()
    errors.install(app)

    @app.get("/power")
    def power(exponent: float) -> float:
        return 10.0**exponent

    # when
    answer = TestClient(app, raise_server_exceptions=False).get("/power", params={"exponent": 999})
    # then
    assert (answer.status_code, "huge numbers are refused" in answer.json()["detail"]) == (400, True)

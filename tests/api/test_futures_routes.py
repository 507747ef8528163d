"""A future resolves the moment its outcome is there, and holds nothing while it waits."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable

import httpx
import numpy as np
import pytest
from sqlalchemy import update
from tinker.proto.response_conv import deserialize_sample_response

from api.app import create_app
from api.services import Services, make_waiters
from jobs.operations import ModelCreated, Outcome, SampledSequence, SampleOutcome
from storage import tables
from storage.open import Storage
from tests.api.conftest import MODEL, Account


def step(account: Account, run: str, seq: int) -> str:
    return str(account.post("optim_step", {"model_id": run, "seq_id": seq, "adam_params": {}}).json()["request_id"])


def sampler(account: Account, session: str | None = None) -> str:
    body = {"session_id": session or account.session(), "sampling_session_seq_id": 0, "base_model": MODEL}
    return str(account.post("create_sampling_session", body).json()["sampling_session_id"])


def sample(account: Account, sampling_session: str, seq: int = 0) -> str:
    body = {"sampling_session_id": sampling_session, "seq_id": seq, "prompt": {"chunks": [{"tokens": [1]}]}}
    return str(account.post("asample", body).json()["request_id"])


def test_a_poll_without_outcome_is_answered_408_with_the_queue_state(alice: Account, a_worker_runs: None) -> None:
    request_id = f"{alice.run()}:0"
    answer = alice.retrieve(request_id)
    assert answer.status_code == 408
    assert answer.json() == {"type": "try_again", "request_id": request_id, "queue_state": "active"}


def test_a_poll_behind_a_gap_says_which_seq_is_missing(alice: Account, a_worker_runs: None) -> None:
    run = alice.run()
    waiting = alice.retrieve(step(alice, run, 3)).json()
    assert waiting["queue_state"] == "paused_capacity"
    assert "seq_id 1 has not arrived" in waiting["queue_state_reason"]
    # and: what lies before the gap does not wait for it
    assert alice.retrieve(f"{run}:0").json()["queue_state"] == "active"


def test_a_poll_while_no_worker_runs_says_so(alice: Account) -> None:
    assert "no worker is running" in alice.retrieve(f"{alice.run()}:0").json()["queue_state_reason"]


def test_a_result_may_be_fetched_again(alice: Account, complete: Callable[[str, Outcome], None]) -> None:
    run = alice.run()
    complete(f"{run}:0", ModelCreated(run))
    assert alice.retrieve(f"{run}:0").json() == alice.retrieve(f"{run}:0").json()


def test_an_unknown_request_is_404_and_so_is_another_accounts(alice: Account, bob: Account) -> None:
    request_id = f"{alice.run()}:0"
    unknown, foreign = bob.retrieve("x"), bob.retrieve(request_id)
    assert (unknown.status_code, foreign.status_code) == (404, 404)
    assert foreign.text.replace(request_id, "x") == unknown.text


def test_an_expired_result_is_410(alice: Account, storage: Storage, complete: Callable[[str, Outcome], None]) -> None:
    run = alice.run()
    complete(f"{run}:0", ModelCreated(run))
    with storage.database.begin() as tx:
        tx.execute(update(tables.operation).values(expired=True, outcome=None))
    assert alice.retrieve(f"{run}:0").status_code == 410


def test_a_sample_arrives_as_protobuf(alice: Account, complete: Callable[[str, Outcome], None]) -> None:
    request_id = sample(alice, sampler(alice))
    drawn = SampledSequence(np.array([4, 5], np.int32), np.array([-1, -2], np.float32), stopped=True)
    complete(request_id, SampleOutcome((drawn,)))
    response = deserialize_sample_response(alice.retrieve(request_id, accept="application/x-protobuf").content)
    assert response.sequences[0].tokens == [4, 5]


class TestCancel:
    def test_a_queued_sample_ends_with_an_error(self, alice: Account) -> None:
        request_id = sample(alice, sampler(alice))
        assert alice.post("cancel_future", {"request_id": request_id}).status_code == 200
        assert alice.retrieve(request_id).json() == {"error": "the sample was cancelled", "category": "user"}

    def test_a_training_operation_is_left_as_it_is(self, alice: Account) -> None:
        request_id = f"{alice.run()}:0"
        assert alice.post("cancel_future", {"request_id": request_id}).status_code == 200
        assert alice.retrieve(request_id).status_code == 408

    def test_another_accounts_sample_is_404(self, alice: Account, bob: Account) -> None:
        request_id = sample(alice, sampler(alice))
        assert bob.post("cancel_future", {"request_id": request_id}).status_code == 404
        assert alice.retrieve(request_id).status_code == 408


@pytest.mark.parametrize("woken_by", ["notification", "safety read"])
def test_a_waiting_poll_is_woken_by_the_outcome(
    woken_by: str, services: Services, alice: Account, complete: Callable[[str, Outcome], None]
) -> None:
    """Far earlier than its poll time, which is longer than the test may take."""
    run = alice.run()
    safety_read_s = 0.05 if woken_by == "safety read" else 1e9
    patient = _patient(services, safety_read_s=safety_read_s)

    async def scenario() -> httpx.Response:
        async with _client(patient) as client:
            poll = asyncio.create_task(_poll(client, alice, f"{run}:0"))
            await _until(lambda: len(patient.waiters) == 1)
            await asyncio.to_thread(complete, f"{run}:0", ModelCreated(run))
            if woken_by == "notification":
                patient.waiters.wake([f"{run}:0"])
            return await poll

    assert asyncio.run(scenario()).json()["model_id"] == run


def test_a_thousand_waiting_polls_hold_no_thread_and_no_connection(services: Services, alice: Account) -> None:
    # given: 1,000 polls that wait
    run = alice.run()
    patient = _patient(services, safety_read_s=0.2)

    async def scenario() -> None:
        async with _client(patient) as client:
            polls = [asyncio.create_task(_poll(client, alice, f"{run}:0")) for _ in range(1000)]
            await _until(lambda: sum(map(len, patient.waiters._events.values())) == 1000)
            await _until(lambda: patient.database.engine.pool.checkedout() == 0)
            # then: threads are those of the pool, and other requests are answered meanwhile
            assert threading.active_count() < 40
            health = await asyncio.wait_for(client.get("/api/v1/healthz"), 30)
            assert health.json()["status"] == "ok"
            # and: told to end, all of them are answered at once
            patient.waiters.end()
            answers = await asyncio.gather(*polls)
            assert {answer.status_code for answer in answers} == {408}

    asyncio.run(scenario())


def _patient(services: Services, *, safety_read_s: float) -> Services:
    """Services whose polls wait as long as the test runs."""
    settings = services.settings.model_copy(update={"poll_s": 1e6})
    waiters = make_waiters(services.database, safety_read_s=safety_read_s)
    return dataclasses.replace(services, settings=settings, waiters=waiters)


class _client:  # noqa: N801, reads as a function
    """An HTTP client in the event loop of the app, whose lifespan it runs."""

    def __init__(self, services: Services) -> None:
        self._app = create_app(services)
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(self._app), base_url="http://api")

    async def __aenter__(self) -> httpx.AsyncClient:
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()
        return self._client

    async def __aexit__(self, *error: object) -> None:
        await self._client.aclose()
        await self._lifespan.__aexit__(None, None, None)


async def _poll(client: httpx.AsyncClient, account: Account, request_id: str) -> httpx.Response:
    headers = {"X-API-Key": account.secret}
    body = {"request_id": request_id, "allow_metadata_only": True}
    return await client.post("/api/v1/retrieve_future", json=body, headers=headers, timeout=None)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.01)

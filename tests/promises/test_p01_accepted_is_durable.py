"""P1: once a request id is returned, no crash of any process loses the operation; it needs no client to complete."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from celery import Celery

from api.cli.broker import ping
from jobs.app import make_app
from jobs.dispatch import Dispatcher
from jobs.settings import JobsSettings
from storage.failpoints import Point
from tests.promises.conftest import SHORT_LEASES, Connect
from tests.promises.kit import PROGRAM, PatientWire, batch, billed, wait_until
from tests.setups.deployment import Deployment
from tests.wire.conftest import PROTOBUF, Wire
from tests.wire.messages import forward_backward

pytestmark = pytest.mark.processes

Undisturbed = tuple[list[Any], list[list[tuple[Any, ...]]]]
RETENTION_S = 2.0


@pytest.mark.parametrize("point", [Point.UPLOAD_PUT, Point.ROW_WRITTEN, Point.MESSAGE_BEGUN, Point.ACCEPTED])
def test_an_api_killed_while_it_accepts_leaves_one_operation_for_the_clients_retry(
    service: Deployment, wire: PatientWire, undisturbed: Undisturbed, point: Point
) -> None:
    # given a run, and an api process that will be killed before it can answer
    run = wire.run()
    (api,) = service.pids("api")
    service.arm(point, pid=api)
    body = forward_backward(run, 1, batch(1))

    # when the client submits, hears nothing (or does, where only the announcement was cut short), and submits again
    with contextlib.suppress(httpx.TransportError):
        Wire.post(wire, "forward_backward", content=body, headers={"Content-Type": PROTOBUF})
    assert service.fired(point) == api
    request_id = wire.submit_protobuf(body)

    # then there is one operation, which is computed and billed once
    assert wire.result(request_id) == undisturbed[0][0]
    (_, operation) = billed(service, run=run)
    assert (operation.request_id, operation.amounts) == (request_id, undisturbed[1][0])


def test_what_an_api_wrote_down_before_it_was_killed_completes_without_a_retry(
    service: Deployment, wire: PatientWire
) -> None:
    # given an api process that is killed between writing an operation down and announcing it
    run = wire.run()
    (api,) = service.pids("api")
    service.arm(Point.MESSAGE_BEGUN, pid=api)

    # when a client submits and is never seen again
    with contextlib.suppress(httpx.TransportError):
        Wire.post(
            wire, "forward_backward", content=forward_backward(run, 1, batch(1)), headers={"Content-Type": PROTOBUF}
        )

    # then the operation completes all the same: the message was a hint
    wait_until(lambda: billed(service, run=run)[1].status == "completed", "completed", service)


def test_a_broker_that_restarts_empty_loses_no_operation(
    service: Deployment, wire: PatientWire, undisturbed: Undisturbed
) -> None:
    # given operations that are announced to a worker which has died
    run = wire.run()
    service.kill("worker")
    request_ids = [wire.submit_seq(run, seq) for seq in PROGRAM]

    # when the broker forgets its messages and is killed
    broker = JobsSettings(data_dir=service.directory / "data").broker_socket()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(broker))
        connection.sendall(b"FLUSHALL\r\n")
        assert connection.recv(64).startswith(b"+OK")
    service.kill("broker")
    wait_until(lambda: ping(broker), "the broker is back", service)

    # then all operations complete
    assert [wire.result(request_id) for request_id in request_ids] == undisturbed[0]


def test_after_the_death_of_everything_at_once_the_work_goes_on_by_itself(
    service: Deployment, wire: PatientWire, undisturbed: Undisturbed
) -> None:
    # given a run in mid-training, with operations that have a request id and no outcome
    run = wire.run()
    service.arm(Point.TURN_COMPUTED, "pause 3600")
    request_ids = [wire.submit_seq(run, seq) for seq in PROGRAM]
    service.fired(Point.TURN_COMPUTED)

    # when every process is killed, and the service is started again
    service.kill_everything()
    service.start()

    # then the operations complete, without any client asking
    wait_until(lambda: billed(service, run=run)[-1].status == "completed", "completed", service)
    assert [wire.result(request_id) for request_id in request_ids] == undisturbed[0]


def test_operations_complete_though_their_client_is_gone(service: Deployment, connect: Connect) -> None:
    # given a client that submits training and a sample, says goodbye, and leaves without having polled
    leaving = connect(service)
    run = leaving.run()
    submitted = [leaving.submit_seq(run, 1), leaving.submit_seq(run, 2), leaving.sample(leaving.sampler())]
    leaving.post(f"sessions/{leaving.session}/finish", {"reason": {"type": "success"}})
    leaving.http.close()

    # when the work is done
    wait_until(lambda: all(_is_done(service, one) for one in submitted), "completed", service)

    # then whoever comes with the account's key finds the results
    coming_back = connect(service)
    assert coming_back.result(submitted[0])["metrics"]["loss:sum"] > 0
    assert coming_back.result(submitted[1])["metrics"]["grad_norm"] > 0
    assert len(coming_back.result(submitted[2])["sequences"]) == 2


# ---------------------------------------------------------------------------------------------------------- retention


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Deployment]:
    """A service that keeps results for moments only."""
    retention = {"PIECEWORK_RESULT_RETENTION_S": str(RETENTION_S), "PIECEWORK_WRITEBACK_S": "0.05"}
    settings = {**SHORT_LEASES, **retention}
    deployed = Deployment(tmp_path_factory.mktemp("forgetful"), tiny_model, settings=settings)
    yield deployed
    deployed.close()


@pytest.fixture
def dispatcher(forgetful: Deployment) -> Iterator[Dispatcher]:
    """Sends messages to its workers."""
    app: Celery = make_app(JobsSettings(broker_url=forgetful.broker_url()))
    with forgetful.storage() as storage:
        yield Dispatcher(app, storage.database, message_expires_s=60)
    app.close()


def test_results_are_answered_410_once_their_time_is_over(
    forgetful: Deployment, connect: Connect, dispatcher: Dispatcher
) -> None:
    # given a sample and a training operation that have been fetched, and the run has gone on
    wire = connect(forgetful)
    run = wire.run()
    trained, drawn = wire.submit_seq(run, 1), wire.sample(wire.sampler())
    assert wire.result(trained)
    assert wire.result(drawn)
    for seq in range(2, 12):
        wire.result(wire.submit_seq(run, seq))  # one by one, so that snapshots come to lie behind the first

    # when their retention is over and the sweep of objects has come by
    def is_gone(request_id: str) -> bool:
        dispatcher.announce_sweep()
        return wire.outcome(request_id).status_code == 410

    for request_id in (trained, drawn):
        wait_until(lambda request_id=request_id: is_gone(request_id), "gone", forgetful)

    # then they are gone, what they cost is not, and the run goes on
    assert "expired" in wire.outcome(trained).json()["detail"]
    assert [len(operation.usage) for operation in billed(forgetful, run=run)] == [1] * 12
    assert wire.result(wire.submit_seq(run, 12))["metrics"]["grad_norm"] > 0


def test_results_are_kept_for_seven_days_unless_set_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIECEWORK_RESULT_RETENTION_S", raising=False)
    assert JobsSettings().result_retention_s == 7 * 24 * 3600


def _is_done(service: Deployment, request_id: str) -> bool:
    return billed(service, request_id=request_id)[0].status == "completed"

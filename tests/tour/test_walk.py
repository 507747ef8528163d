"""Read this first: one `forward_backward` from the door to the bill, one test per station of ARCHITECTURE.md.

The stations stand on each other, in the order of the file; edge cases are elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from fastapi.testclient import TestClient

from api import tinker_public_pb2 as wire
from billing import cost
from billing.usage_totals import Scope
from jobs.operations import ForwardBackward, ForwardBackwardOutcome, decode
from storage import journal, runs, snapshots
from tests.worker.harness import MODEL, Engine, Service

PROTOBUF = "application/x-protobuf"


@dataclass
class Visit:
    """What one station tells the next."""

    run_id: str = ""
    request_id: str = ""


@pytest.fixture(scope="module")
def visit() -> Visit:
    """The one operation that is followed."""
    return Visit()


def test_1_a_client_opens_a_session_and_makes_a_run(door: TestClient, visit: Visit) -> None:
    session = door.post("/api/v1/create_session", json={"tags": [], "sdk_version": "0.38.0", "user_metadata": {}})
    made = door.post(
        "/api/v1/create_model",
        json={
            "session_id": session.json()["session_id"],
            "model_seq_id": 0,
            "base_model": MODEL,
            "lora_config": {"rank": 4, "seed": 1},
        },
    )
    visit.run_id = made.json()["model_id"]
    assert visit.run_id == session.json()["session_id"] + ":train:0"


def test_2_api_answers_with_a_request_id_at_once(door: TestClient, visit: Visit) -> None:
    request = wire.ForwardBackwardRequest(model_id=visit.run_id, seq_id=1, loss_fn="cross_entropy")
    datum = request.data.add()
    datum.model_input.add().encoded_text.tokens = np.array([5, 6, 7], "<i4").tobytes()
    targets, weights = datum.loss_fn_inputs["target_tokens"], datum.loss_fn_inputs["weights"]
    targets.dense, targets.dtype = np.array([6, 7, 8], "<i8").tobytes(), wire.DTYPE_INT64
    weights.dense, weights.dtype = np.ones(3, "<f4").tobytes(), wire.DTYPE_FLOAT32
    headers = {"Content-Type": PROTOBUF}
    answer = door.post("/api/v1/forward_backward", content=request.SerializeToString(), headers=headers)
    visit.request_id = answer.json()["request_id"]
    assert visit.request_id == f"{visit.run_id}:1"


def test_3_the_operation_is_in_the_journal_and_announced(service: Service, visit: Visit) -> None:
    with service.storage.database.read() as tx:
        operation = journal.get_operation(tx, visit.request_id)
    body = decode(service.storage.payloads.get(operation.payload))
    assert operation.status == "queued"
    assert isinstance(body, ForwardBackward)
    assert body.data[0].tokens.tolist() == [5, 6, 7]
    assert visit.run_id in service.announced.runs


def test_4_who_polls_is_told_to_wait(door: TestClient, visit: Visit) -> None:
    answer = door.post("/api/v1/retrieve_future", json={"request_id": visit.request_id, "allow_metadata_only": True})
    assert answer.status_code == 408
    assert answer.json()["type"] == "try_again"


def test_5_a_worker_takes_the_run_over_and_computes(service: Service, engine: Engine, visit: Visit) -> None:
    with service.storage.database.read() as tx:
        run = runs.get_run(tx, visit.run_id)
    engine.take(run)
    outcome = service.outcome(visit.request_id)
    assert isinstance(outcome, ForwardBackwardOutcome)
    assert outcome.metrics["loss:sum"] == pytest.approx(-float(outcome.logprobs[0].sum()), rel=1e-6)


def test_6_outcome_state_version_and_usage_are_committed_together(service: Service, visit: Visit) -> None:
    with service.storage.database.read() as tx:
        run = runs.get_run(tx, visit.run_id)
        report = cost.report(tx, Scope(run_id=visit.run_id))
    assert run.state_seq == 1
    assert {row.usage.kind: row.usage.operations for row in report.rows} == {"create_model": 1, "forward_backward": 1}


def test_7_the_next_poll_brings_the_outcome(door: TestClient, visit: Visit) -> None:
    answer = door.post(
        "/api/v1/retrieve_future",
        json={"request_id": visit.request_id, "allow_metadata_only": True},
        headers={"Accept": PROTOBUF},
    )
    output = wire.ForwardBackwardOutput.FromString(answer.content)
    logprobs = np.frombuffer(output.loss_fn_outputs[0].fields["logprobs"].data, "<f4")
    assert answer.headers["Content-Type"] == PROTOBUF
    assert -logprobs.sum() == pytest.approx(output.metrics["loss:sum"], rel=1e-6)


def test_8_the_state_is_written_back(service: Service, engine: Engine, visit: Visit) -> None:
    engine.leave()
    with service.storage.database.read() as tx:
        assert snapshots.newest_seq(tx, visit.run_id) == 1
        assert runs.get_run(tx, visit.run_id).lease_worker is None


def test_9_the_bill_says_what_it_used(door: TestClient, visit: Visit) -> None:
    report = door.get("/api/v1/cost", params={"run": visit.run_id}).json()
    assert door.get("/api/v1/cost", params={"run": "another"}).json()["rows"] == []
    (row,) = [row for row in report["rows"] if row["kind"] == "forward_backward"]
    assert row["tokens_trained"] == 3
    assert float(row["device_seconds"]) > 0

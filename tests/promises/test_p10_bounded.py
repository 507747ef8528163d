"""P10: every queue and request has a limit, which is enforced and answered with a status that the SDK understands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from storage.failpoints import Point
from tests.promises.conftest import BODY_BYTES_MAX, QUEUED_MAX, TRAINING_FACTOR, Connect
from tests.promises.kit import PatientWire, batch
from tests.setups.deployment import Deployment
from tests.wire.messages import forward_backward

pytestmark = pytest.mark.processes


@pytest.fixture
def wire(strict: Deployment, connect: Connect) -> Iterator[PatientWire]:
    """A session on it."""
    yield connect(strict)
    strict.disarm()


def test_who_has_too_much_waiting_is_told_to_come_back_later_and_then_gets_everything(
    strict: Deployment, wire: PatientWire, connect: Connect
) -> None:
    # given a worker that stands still, and an account with as much waiting as it may have
    run, sampler = wire.run(), wire.sampler()
    other = connect(strict, strict.create_account("other"))
    strict.arm(Point.TURN_BEGUN, "pause 3600")
    accepted = [wire.submit_seq(run, 1)]
    strict.fired(Point.TURN_BEGUN)
    accepted += [wire.sample(sampler, seq) for seq in range(QUEUED_MAX - 1)]

    # when it submits more samples, and more training than even training may have
    sample = _sample(sampler, QUEUED_MAX)
    refused = wire.post("asample", sample)
    more = range(2, 2 + (TRAINING_FACTOR - 1) * QUEUED_MAX)
    accepted += [wire.submit_seq(run, seq) for seq in more]
    body = forward_backward(run, more.stop, batch(1))
    refused_training = wire.post("forward_backward", content=body, headers={"Content-Type": "application/x-protobuf"})

    # then it is told to wait, in words and numbers; what was accepted is so when repeated, and others do not notice
    for answer in (refused, refused_training):
        assert answer.status_code == 429
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.json()["detail"]
    assert wire.submit_seq(run, 1) == accepted[0]
    assert wire.sample(sampler, 0) == accepted[1]
    waiting_for_other = other.sample(other.sampler())

    # and once a worker works, all that was accepted completes, and what was refused is welcome
    strict.kill("worker")
    for request_id in accepted:
        wire.result(request_id)
    assert wire.result(wire.submit("asample", sample))["sequences"]
    assert wire.result(wire.submit_protobuf(body))["metrics"]["loss:sum"] > 0
    assert other.result(waiting_for_other)["sequences"]


def test_a_body_over_the_limit_is_answered_and_consumes_its_number(wire: PatientWire) -> None:
    # given a run
    run = wire.run()

    # when bodies over the limit come: of a request that may fail, and of one whose number others wait for
    metadata = {"tags": ["x" * BODY_BYTES_MAX], "user_metadata": {}, "sdk_version": "0.38.0", "type": "create_session"}
    too_large = wire.post("create_session", metadata)
    training = wire.submit_protobuf(forward_backward(run, 1, batch(1) * 20))

    # then the one is 413; the other's future fails, says what to change, and the run goes on
    assert too_large.status_code == 413
    failure = wire.failure(training)
    assert f"over the limit of {BODY_BYTES_MAX} bytes" in failure["error"]
    assert failure["category"] == "user"
    assert wire.result(wire.submit_protobuf(forward_backward(run, 2, batch(1))))["metrics"]["loss:sum"] > 0


def test_what_is_asked_for_in_one_request_is_bounded(wire: PatientWire) -> None:
    # given a run and a sampling session
    run, sampler = wire.run(), wire.sampler()

    # when somebody asks for too many sequences, too many rows, or a number far beyond all others
    sequences = wire.post("asample", {**_sample(sampler, 0), "num_samples": 100_000})
    rows = wire.http.get("/api/v1/sessions", params={"limit": 1_000_000})
    far = wire.failure(wire.step(run, 10_000_000))

    # then none of them costs more than the answer
    assert sequences.status_code == 400
    assert "num_samples" in sequences.json()["detail"]
    assert rows.status_code == 422
    assert "too far ahead" in far["error"]


def _sample(sampler: str, seq: int) -> dict[str, object]:
    return {
        "sampling_session_id": sampler,
        "seq_id": seq,
        "num_samples": 1,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
        "sampling_params": {"max_tokens": 2, "seed": 1},
        "type": "sample",
    }

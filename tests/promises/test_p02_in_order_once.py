"""P2: a run's operations take effect in `seq` order, exactly once; a `seq` that never arrives is closed."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from jobs.settings import JobsSettings
from storage.failpoints import Point
from tests.promises.conftest import GAP_TIMEOUT_S, Connect
from tests.promises.kit import PROGRAM, PatientWire, batch, billed
from tests.setups.deployment import Deployment
from tests.wire.messages import forward_backward

pytestmark = pytest.mark.processes

Undisturbed = tuple[list[Any], list[list[tuple[Any, ...]]]]
CLIENTS = 6


def test_operations_that_arrive_shuffled_and_thrice_take_effect_once_and_in_order(
    service: Deployment, wire: PatientWire, undisturbed: Undisturbed
) -> None:
    # given a run, and its operations in any order, each of them three times
    run = wire.run()
    arriving = list(PROGRAM) * 3
    random.Random(1).shuffle(arriving)

    # when several connections submit them at once
    with ThreadPoolExecutor(CLIENTS) as clients:
        request_ids = dict(zip(arriving, clients.map(lambda seq: wire.submit_seq(run, seq), arriving), strict=True))

    # then a seq is one operation, whoever asks, and all results are those of the program in its order
    assert [wire.result(request_ids[seq]) for seq in PROGRAM] == undisturbed[0]
    operations = billed(service, run=run)
    assert [operation.request_id for operation in operations[1:]] == [request_ids[seq] for seq in PROGRAM]
    assert [operation.amounts for operation in operations[1:]] == undisturbed[1]


def test_the_same_seq_with_another_body_is_the_first_one(wire: PatientWire, undisturbed: Undisturbed) -> None:
    # given an operation that has been accepted, and one that has been computed
    run = wire.run()
    first = wire.submit_seq(run, 1)
    assert wire.result(first) == undisturbed[0][0]
    second = wire.submit_seq(run, 3)  # waits for seq 2

    # when other bodies are submitted under their numbers
    repeated = [wire.submit_protobuf(forward_backward(run, seq, batch(99))) for seq in (1, 3)]

    # then they are the first ones, and change nothing
    assert repeated == [first, second]
    assert wire.result(wire.submit_seq(run, 2)) == undisturbed[0][1]
    assert wire.result(second) == undisturbed[0][2]


def test_a_repetition_after_the_outcome_was_written_and_its_worker_killed_computes_nothing_again(
    service: Deployment, wire: PatientWire, undisturbed: Undisturbed
) -> None:
    # given a worker that is killed as soon as it has committed, before it has told anybody
    run = wire.run()
    service.arm(Point.COMMITTED)
    request_id = wire.submit_seq(run, 1)
    service.fired(Point.COMMITTED)

    # when the client submits the same again
    repeated = wire.submit_seq(run, 1)

    # then it finds what was computed
    assert repeated == request_id
    assert wire.result(request_id) == undisturbed[0][0]
    operation = billed(service, run=run)[1]
    assert (operation.attempts, operation.amounts) == (1, undisturbed[1][0])


# --------------------------------------------------------------------------------------------------------------- gaps


def test_a_seq_that_never_arrives_is_closed_and_nothing_waits_for_ever(strict: Deployment, connect: Connect) -> None:
    # given a run whose seq 1 is missing, while a step, a pass and another step wait behind it
    wire = connect(strict)
    run = wire.run()
    behind = [wire.submit_seq(run, seq) for seq in (2, 3, 4)]

    # when the gap's time is over
    failed = wire.failure(behind[0])

    # then its place holds an error that says so, and what was submitted without knowing of it fails or goes on
    closed = wire.failure(f"{run}:1")
    assert f"seq_id 1 did not arrive within {GAP_TIMEOUT_S} s" in closed["error"]
    assert "seq_id 1" in failed["error"]
    assert wire.result(behind[1])["metrics"]["loss:sum"] > 0
    assert wire.result(behind[2])["metrics"]["grad_norm"] > 0

    # and the operation that comes too late is told the same, and changes nothing
    assert wire.submit_seq(run, 1) == f"{run}:1"
    assert wire.failure(f"{run}:1") == closed
    assert [operation.attempts for operation in billed(strict, run=run)[:2]] == [1, 0]


def test_gaps_are_closed_after_ten_minutes_unless_set_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIECEWORK_GAP_TIMEOUT_S", raising=False)
    assert JobsSettings().gap_timeout_s == 600

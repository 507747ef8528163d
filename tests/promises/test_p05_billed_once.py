"""P5: every completed operation has exactly one usage record; failed attempts, replays and idling are never billed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import func, select

from storage import billing_tables, tables
from storage.failpoints import Point
from tests.promises.conftest import Connect
from tests.promises.kit import PatientWire, billed
from tests.setups.deployment import Deployment
from tests.tiny_model import VOCAB_SIZE
from tests.wire.messages import datum, forward_backward

pytestmark = pytest.mark.processes

Undisturbed = tuple[list[Any], list[list[tuple[Any, ...]]]]
TRAINING = (Point.TURN_STARTED, Point.TURN_COMPUTED, Point.COMMIT_WRITTEN, Point.COMMITTED, Point.TAIL_REPLAYED)
SAMPLING = (Point.CLAIMED, Point.SAMPLES_DRAWN, Point.SAMPLE_COMMIT_WRITTEN, Point.SAMPLES_COMMITTED)

SAVING = (Point.UPLOAD_PUT, Point.COMMIT_WRITTEN)


def test_training_costs_the_same_wherever_its_workers_are_killed(
    service: Deployment, wire: PatientWire, undisturbed: Undisturbed
) -> None:
    # given a run, and a worker that is killed at another point in each of its steps
    run = wire.run()
    results = []
    for step, point in enumerate(TRAINING, start=1):
        request_ids = _submit_step(service, wire, run, step, point)
        service.fired(point)
        results += [wire.result(request_id) for request_id in request_ids]

    # when its operations are counted
    operations = billed(service, run=run)[1:]

    # then each has one usage record, over the same tokens as in a run to which nothing happened
    num = 2 * len(TRAINING)
    assert results == undisturbed[0][:num]
    assert [operation.amounts for operation in operations] == undisturbed[1][:num]

    # and what its owner is shown adds up to that
    rows = service.command_json("cost", "--run", run)["rows"]
    shown = {row["kind"]: (row["operations"], row["tokens_trained"]) for row in rows}
    trained = sum(amounts[0][1] for amounts in undisturbed[1][:num])
    assert shown["forward_backward"] == (len(TRAINING), trained)
    assert shown["optim_step"] == (len(TRAINING), 0)


def test_samples_cost_the_same_wherever_their_workers_are_killed(service: Deployment, wire: PatientWire) -> None:
    # given what a sample costs
    sampler = wire.sampler()
    undisturbed = wire.sample(sampler, 0)
    sequences = wire.result(undisturbed)["sequences"]
    (expected,) = billed(service, request_id=undisturbed)

    # when the same is drawn by workers that are killed
    for seq, point in enumerate(SAMPLING, start=1):
        service.arm(point)
        request_id = wire.sample(sampler, seq)
        service.fired(point)

        # then it is the same, and costs the same, once
        assert wire.result(request_id)["sequences"] == sequences
        (operation,) = billed(service, request_id=request_id)
        assert operation.amounts == expected.amounts


def test_a_checkpoint_is_kept_from_its_commit_on_wherever_its_workers_are_killed(
    service: Deployment, wire: PatientWire
) -> None:
    # given saves whose workers are killed before, between and after the objects and their row
    run = wire.run()
    for seq, point in enumerate(SAVING, start=1):
        service.arm(point)
        request_id = wire.submit("save_weights", {"model_id": run, "seq_id": seq, "path": f"kept-{seq}"})
        service.fired(point)
        wire.result(request_id)

    # when what is kept is held against what is charged by its bytes and time
    span, checkpoint = billing_tables.storage_span.c, tables.checkpoint.c
    with service.storage() as storage, storage.database.read() as tx:
        kept = tx.execute(
            select(checkpoint.id, checkpoint.size_bytes, checkpoint.created_at)
            .where(checkpoint.run_id == run)
            .order_by(checkpoint.id)
        ).all()
        spans = tx.execute(
            select(span.checkpoint_id, span.size_bytes, span.since).where(span.run_id == run).order_by(span.id)
        ).all()

    # then each is kept once, since it was committed, and what died before left nothing
    assert len(kept) == len(SAVING)
    assert spans == kept


def test_what_fails_is_not_billed(service: Deployment, wire: PatientWire) -> None:
    # given an operation that is refused, and a step behind it that fails for it
    run = wire.run()
    bad = wire.submit_protobuf(forward_backward(run, 1, [datum([5, VOCAB_SIZE, 6])]))
    behind = wire.submit_seq(run, 2)

    # when both have failed
    for request_id in (bad, behind):
        wire.failure(request_id)

    # then neither has a usage record
    assert [operation.usage for operation in billed(service, run=run)[1:]] == [[], []]


@pytest.mark.servers
def test_everything_that_any_test_has_had_done_was_billed_once(
    embedded: Deployment, deployed: Deployment, connect: Connect
) -> None:
    # given two set-ups on which much has been killed, and some work more
    for deployment in (embedded, deployed):
        wire = connect(deployment)
        wire.run_program(wire.run())
        wire.result(wire.sample(wire.sampler()))

        # when completed operations are held against usage records
        completed, records, billed_operations = _count(deployment)

        # then there is one for each, and none for anything else
        assert completed > 0
        assert (records, billed_operations) == (completed, completed)


def _submit_step(service: Deployment, wire: PatientWire, run: str, step: int, point: Point) -> Sequence[str]:
    """Submit a step whose worker will be killed; what happens in a takeover needs one that is killed before."""
    service.arm(point)
    if point is Point.TAIL_REPLAYED:
        service.kill("worker")
    return [wire.submit_seq(run, seq) for seq in (2 * step - 1, 2 * step)]


def _count(deployment: Deployment) -> tuple[int, int, int]:
    """Completed operations, usage records, and completed operations that have one."""
    operation, record = tables.operation, billing_tables.usage_record
    completed = select(func.count()).select_from(operation).where(operation.c.status == "completed")
    joined = operation.join(record, record.c.operation_id == operation.c.id)
    with deployment.storage() as storage, storage.database.read() as tx:
        return (
            tx.execute(completed).scalar_one(),
            tx.execute(select(func.count()).select_from(record)).scalar_one(),
            tx.execute(completed.select_from(joined)).scalar_one(),
        )

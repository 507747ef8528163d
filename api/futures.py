"""What a future says: its outcome in the encoding the client accepts, or why it still waits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal

import structlog
from fastapi.responses import JSONResponse, Response
from sqlalchemy import Connection

from api.errors import GoneError
from api.services import Services
from api.wire import json_results, results
from billing import pauses, rate_cards, usage_totals
from billing.budgets import Budget
from billing.money import from_units
from billing.usage_totals import Scope
from jobs import caps, operations
from jobs.operations import (
    Category,
    Failure,
    ForwardBackwardOutcome,
    Kind,
    OptimStepOutcome,
    Outcome,
    SampleOutcome,
    UnreadableOperationError,
)
from storage import journal, runs, workers
from storage.errors import DamagedObjectError, ObjectNotFoundError
from storage.journal import Operation, Status

log = structlog.get_logger()

REFUSAL_HELD_BACK_S = 0.25
WORKER_SILENT_S = 60.0
"""A worker not seen this long does not count as running."""


@dataclass(frozen=True)
class QueueState:
    """Why an operation has no outcome yet, as the SDK shows it."""

    state: Literal["active", "paused_capacity"]
    reason: str | None = None


def answer(services: Services, operation: Operation, *, accept: str) -> Response:
    """The outcome of a finished operation.

    Args:
        accept: the request's Accept header; training and sampling results are protobuf for who accepts it.

    Raises:
        GoneError: the outcome has been kept as long as promised.
    """
    if operation.status != Status.COMPLETED:
        if operation.kind == Kind.FORWARD_BACKWARD and operation.failure_number is None:
            with services.database.begin() as tx:
                journal.note_failure_known(tx, journal.get_operation(tx, operation.request_id))
        return JSONResponse({"error": operation.error or "it failed", "category": operation.error_category or "server"})
    outcome = read_outcome(services, operation)
    if results.MEDIA_TYPE in accept and isinstance(outcome, ForwardBackwardOutcome):
        return Response(results.forward_backward(outcome), media_type=results.MEDIA_TYPE)
    if results.MEDIA_TYPE in accept and isinstance(outcome, SampleOutcome):
        return Response(results.sample(outcome), media_type=results.MEDIA_TYPE)
    if isinstance(outcome, OptimStepOutcome):
        outcome = replace(outcome, metrics={**outcome.metrics, **_cost_metric(services, operation)})
    return JSONResponse(json_results.result(Kind(operation.kind), outcome))


def _cost_metric(services: Services, operation: Operation) -> dict[str, float]:
    """What the operation's run has cost by now: told with the result, never kept with it."""
    with services.database.read() as tx:
        currency = rate_cards.currency(tx)
        scope = Scope(account_id=operation.account_id, run_id=operation.run_id)
        return {f"cost_{currency.lower()}": float(from_units(usage_totals.charged(tx, scope)))}


def held_back_s(services: Services, operation: Operation) -> float:
    """How long to keep a refusal back, in seconds.

    The SDK polls at once, while the `optim_step` that the script has pipelined behind the refused `forward_backward` is
    still on its way: without this pause it would be chance whether that step counts as submitted with knowledge.
    """
    refused = operation.kind == Kind.FORWARD_BACKWARD and operation.status == Status.FAILED and not operation.attempts
    if not refused or operation.failure_number is not None:
        return 0.0
    with services.database.read() as tx:
        age = services.database.now(tx) - operation.accepted_at
    return max(0.0, min(REFUSAL_HELD_BACK_S, REFUSAL_HELD_BACK_S - age.total_seconds()))


def try_again(services: Services, operation: Operation) -> Response:
    """Ask the client to poll again, and tell it what it waits for."""
    with services.database.read() as tx:
        state = queue_state(tx, services, operation)
    body: dict[str, Any] = {"type": "try_again", "request_id": operation.request_id, "queue_state": state.state}
    if state.reason is not None:
        body["queue_state_reason"] = state.reason
    return JSONResponse(body, status_code=408)


def queue_state(tx: Connection, services: Services, operation: Operation) -> QueueState:
    """What an operation without an outcome waits for."""
    now = services.database.now(tx)
    if operation.run_id is not None:
        refused_seq = runs.refused_before(tx, operation.run_id, operation.seq, now=now)
        if refused_seq is not None:
            return QueueState("paused_capacity", caps.behind(refused_seq))
    missing = None if operation.run_id is None else journal.first_missing(tx, operation.run_id, up_to=operation.seq)
    if missing is not None:
        timeout_s = services.jobs_settings.gap_timeout_s
        return QueueState(
            "paused_capacity",
            f"seq_id {missing} has not arrived; it is closed with an error {timeout_s:.0f} s after a later one came",
        )
    budget = _pausing(tx, operation, now)
    if budget is not None:
        return QueueState("paused_capacity", f"budget: {budget.name} is spent; it goes on by itself when there is room")
    seen_after = now - timedelta(seconds=WORKER_SILENT_S)
    if not workers.list_workers(tx, seen_after=seen_after):
        return QueueState("paused_capacity", "no worker is running; the operation is kept until one is")
    return QueueState("active")


def _pausing(tx: Connection, operation: Operation, now: datetime) -> Budget | None:
    """The budget that an operation waits for."""
    if operation.sampling_session_id is not None:
        return pauses.pausing(tx, operation.sampling_session_id, now=now)
    run_id = str(operation.run_id)
    return pauses.waiting_runs(tx, [run_id], now=now).get(run_id)


def read_outcome(services: Services, operation: Operation) -> Outcome:
    """What a completed operation resolved to.

    Raises:
        GoneError: it has been kept as long as promised.
    """
    expired = f"the result of {operation.request_id} has expired"
    if operation.expired:
        raise GoneError(expired)
    try:
        outcome: Outcome = operations.decode(services.storage.payloads.get(operation.outcome))
    except ObjectNotFoundError as error:
        raise GoneError(expired) from error
    except (DamagedObjectError, UnreadableOperationError) as error:
        log.error("outcome_unreadable", request=operation.request_id, error=str(error))
        return Failure("the operation took effect, but its stored result is damaged", Category.SERVER)
    return outcome

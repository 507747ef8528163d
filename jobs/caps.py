"""What caps mean for operations: how much is held for one that is accepted, and which are left waiting."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from sqlalchemy import Connection

from billing import budgets, dimensions, holds
from billing.holds import OverBudgetError, Wanted
from billing.pauses import COSTLY
from billing.usage import Usage
from jobs.operations import Body, ForwardBackward, Sample
from storage import base_models, journal, runs
from storage.journal import FINAL
from storage.runs import Run, SamplingSession


def hold(tx: Connection, owner: Run | SamplingSession, request_id: str, body: Body, *, now: datetime) -> None:
    """Hold what an operation may cost, in the transaction that accepts it; one that costs nothing is never refused.

    Raises:
        OverBudgetError: a hard cap has no room for it, or for an earlier one of its run.
    """
    if body.kind not in COSTLY or not budgets.has_any(tx, owner.account_id):
        return
    operation = journal.get_operation(tx, request_id)
    if operation.status in FINAL:
        return  # its run was never made: it failed as it was accepted, and nothing would ever release the hold
    wanted = _wanted(tx, owner, body)
    holds.place(tx, budgets.lock(tx, [wanted.whom], now=now), operation.id, wanted, now=now)
    _check_earlier(tx, owner, operation.seq, now=now)


def check(tx: Connection, owner: Run | SamplingSession, seq: int, body: Body, *, now: datetime) -> None:
    """Whether `hold` would find room, as things stand: before anything is stored for an operation that it would refuse.

    Raises:
        OverBudgetError: a hard cap has no room for it, or for an earlier one of its run.
    """
    if body.kind not in COSTLY or not budgets.has_any(tx, owner.account_id):
        return
    wanted = _wanted(tx, owner, body)
    holds.check(tx, budgets.list_covering(tx, wanted.whom, now=now), wanted, now=now)
    _check_earlier(tx, owner, seq, now=now)


def _wanted(tx: Connection, owner: Run | SamplingSession, body: Body) -> Wanted:
    run_id = owner.id if isinstance(owner, Run) else owner.run_id
    whom = replace(dimensions.of_session(tx, owner.session_id), run_id=run_id)
    bound = bound_of(body, context_length=_context_length(tx, owner.base_model))
    return Wanted(whom, body.kind, owner.base_model, bound)


def _check_earlier(tx: Connection, owner: Run | SamplingSession, seq: int, *, now: datetime) -> None:
    refused_seq = runs.refused_before(tx, owner.id, seq, now=now) if isinstance(owner, Run) else None
    if refused_seq is not None:
        raise OverBudgetError(behind(refused_seq))


def behind(refused_seq: int) -> str:
    """What an operation waits for whose run has an earlier one that a cap has no room for."""
    return f"budget: seq_id {refused_seq} of this run waits for room under a cap, and goes first"


def bound_of(body: Body, *, context_length: int) -> Usage:
    """The tokens that an operation uses at most; a sample without `max_tokens` may fill the context."""
    trained = prefilled = sampled = 0
    if isinstance(body, ForwardBackward):
        trained = body.num_tokens
    elif isinstance(body, Sample):
        prefilled = len(body.prompt)
        left = max(1, context_length - prefilled)
        longest = left if body.params.max_tokens is None else min(left, body.params.max_tokens)
        sampled = body.num_samples * longest
    return Usage(
        device="",
        device_ns=0,
        attempt=0,
        worker_id="",
        tokens_trained=trained,
        tokens_prefilled=prefilled,
        tokens_sampled=sampled,
    )


def _context_length(tx: Connection, name: str) -> int:
    model = base_models.find_base_model(tx, name)
    return 0 if model is None else model.context_length

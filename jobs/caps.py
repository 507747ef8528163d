"""What caps mean for operations: how much is held for one that is accepted, and which are left waiting."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection

from billing import budgets, dimensions, holds
from billing.holds import OverBudgetError
from billing.usage import Usage
from jobs.operations import Body, ForwardBackward, OptimStep, Sample
from storage import base_models, journal, runs
from storage.journal import FINAL
from storage.runs import Run, SamplingSession


def hold(tx: Connection, owner: Run | SamplingSession, request_id: str, body: Body, *, now: datetime) -> None:
    """Hold what an operation may cost, in the transaction that accepts it; one that costs nothing is never refused.

    Raises:
        OverBudgetError: a hard cap has no room for it, or for an earlier one of its run.
    """
    if not isinstance(body, ForwardBackward | OptimStep | Sample):
        return
    covering = budgets.lock(tx, [owner.account_id], now=now)
    if not covering:
        return
    operation = journal.get_operation(tx, request_id)
    if operation.status in FINAL:
        return  # its run was never made: it failed as it was accepted, and nothing would ever release the hold
    whom = dimensions.of_session(tx, owner.session_id)
    run_id = owner.id if isinstance(owner, Run) else owner.run_id
    whom = dimensions.Dimensions(**{**whom.__dict__, "run_id": run_id})
    bound = bound_of(body, context_length=_context_length(tx, owner.base_model))
    holds.place(tx, covering, whom, operation, bound, now=now)
    if isinstance(owner, Run):
        refused_seq = runs.refused_before(tx, owner.id, operation.seq, now=now)
        if refused_seq is not None:
            raise OverBudgetError(
                f"budget: seq_id {refused_seq} of this run waits for room under a cap, and goes first"
            )


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

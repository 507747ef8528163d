"""What hard caps pause: runs and samples of scopes that have spent all they may, until there is room again.

Only what costs something waits: a run may still save its weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, String, and_, cast, or_, select

from billing import budgets
from billing.budgets import Budget, Scope
from billing.dimensions import Dimensions
from storage import billing_tables, tables
from storage.journal import OPEN

COSTLY = ("forward", "forward_backward", "optim_step", "sample")
"""Kinds of operations that use the engine."""

_RUNS_PER_QUERY = 1000


def paused_runs(tx: Connection, run_ids: Collection[str], *, now: datetime) -> Mapping[str, Budget]:
    """Those of these runs that are paused, and by which budget."""
    if not run_ids or not budgets.is_any_exhausted(tx):
        return {}
    run, session = tables.run.c, tables.session.c
    whom = (session.account_id, session.project_id, session.api_key_id, session.id, session.batch, run.id)
    query = select(*whom).join(tables.session, session.id == run.session_id)
    every = list(run_ids)
    paused: dict[str, Budget] = {}
    for begin in range(0, len(every), _RUNS_PER_QUERY):
        page = query.where(run.id.in_(every[begin : begin + _RUNS_PER_QUERY]))
        payers = [Dimensions(*row) for row in tx.execute(page)]
        spent = budgets.exhausted(tx, now=now, among=payers)
        paused |= {str(payer.run_id): budget for payer in payers if (budget := _covering(spent, payer)) is not None}
    return paused


def waiting_runs(tx: Connection, run_ids: Collection[str], *, now: datetime) -> Mapping[str, Budget]:
    """Those of these runs that are paused and whose next operation costs something: workers leave them alone."""
    paused = paused_runs(tx, run_ids, now=now)
    if not paused:
        return {}
    run, operation = tables.run.c, tables.operation.c
    query = (
        select(run.id)
        .join(tables.operation, and_(operation.run_id == run.id, operation.seq == run.state_seq + 1))
        .where(run.id.in_(paused), operation.kind.in_(COSTLY), operation.status.in_(OPEN))
    )
    return {run_id: paused[run_id] for run_id in tx.execute(query).scalars()}


def pausing(tx: Connection, sampling_session_id: str, *, now: datetime) -> Budget | None:
    """The budget that pauses what is drawn in a sampling session."""
    if not budgets.is_any_exhausted(tx):
        return None
    payer = payers(tx, [sampling_session_id])[sampling_session_id]
    return _covering(budgets.exhausted(tx, now=now, among=[payer]), payer)


def payers(tx: Connection, sampling_session_ids: Collection[str]) -> Mapping[str, Dimensions]:
    """Whom samples of these sampling sessions are charged to, as it stands now."""
    session, sampling = tables.session.c, tables.sampling_session.c
    whom = (session.account_id, session.project_id, session.api_key_id, session.id, session.batch, sampling.run_id)
    query = (
        select(sampling.id, *whom)
        .join(tables.session, session.id == sampling.session_id)
        .where(sampling.id.in_(sampling_session_ids))
    )
    return {row[0]: Dimensions(*row[1:]) for row in tx.execute(query)}


def unpaused(tx: Connection, *, now: datetime) -> ColumnElement[bool] | None:
    """The condition that a sample of the journal is not paused; None if none is."""
    return unpaused_by(budgets.exhausted_scopes(tx, now=now), now=now)


def unpaused_by(scopes: Collection[str], *, now: datetime) -> ColumnElement[bool] | None:
    """The same, by one who knows of which scopes caps are exhausted now."""
    if not scopes:
        return None
    session, sampling, budget = tables.session.c, tables.sampling_session.c, billing_tables.budget.c
    whole = select(budget.account_id).where(*budgets.exhausted_now(now), budget.scope == Scope.ACCOUNT)
    within_accounts = tables.operation.c.account_id.not_in(whole)
    if set(scopes) == {Scope.ACCOUNT}:
        return within_accounts
    names = {
        Scope.PROJECT: session.project_id,
        Scope.KEY: cast(session.api_key_id, String),
        Scope.SESSION: session.id,
        Scope.BATCH: session.batch,
        Scope.RUN: sampling.run_id,
    }
    covers = or_(*(and_(budget.scope == scope, budget.scope_id == value) for scope, value in names.items()))
    covered = (  # asked once, not for every sample
        select(sampling.id)
        .join(tables.session, session.id == sampling.session_id)
        .join(billing_tables.budget, budget.account_id == session.account_id)
        .where(*budgets.exhausted_now(now), covers)
    )
    return and_(within_accounts, tables.operation.c.sampling_session_id.not_in(covered))


def _covering(spent: Sequence[Budget], whom: Dimensions) -> Budget | None:
    return next((budget for budget in spent if budget.covers(whom)), None)

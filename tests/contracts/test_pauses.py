"""What a spent hard cap pauses: the runs and samples of its scope and no others, and only what costs something."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, insert, select, update

from billing import budgets, money, pauses
from billing.budgets import Budget, Period, Scope
from storage import billing_tables, claims, tables
from storage.database import Database
from storage.journal import Operation
from storage.runs import Run, SamplingSession
from tests.factories import (
    LATER,
    NOW,
    make_account,
    make_operation,
    make_run,
    make_sample,
    make_sampling_session,
    make_session,
)


@dataclass(frozen=True)
class Work:
    """A run with an operation, and a sample of its weights."""

    run: Run
    sampling: SamplingSession
    sample: Operation

    @classmethod
    def make(cls, tx: Connection, **session: Any) -> Work:
        """In a session of its own."""
        opened = make_session(tx, **session)
        run = make_run(tx, session=opened)
        make_operation(tx, run, 0)
        sampling = make_sampling_session(tx, opened, run_id=run.id)
        return cls(run, sampling, make_sample(tx, sampling))

    def id_of(self, scope: Scope) -> str:
        """What a budget of this scope names."""
        ids = {Scope.ACCOUNT: self.run.account_id, Scope.PROJECT: "p", Scope.KEY: "7", Scope.BATCH: "b"}
        return {**ids, Scope.SESSION: self.run.session_id, Scope.RUN: self.run.id}[scope]


def spend(tx: Connection, work: Work, scope: Scope, *, is_hard: bool = True) -> Budget:
    """A budget that covers the work and has nothing left."""
    return budgets.add(tx, work.run.account_id, scope, work.id_of(scope), cap=0, now=NOW, is_hard=is_hard)


def waiting(tx: Connection, *works: Work) -> list[tuple[bool, bool, bool, bool]]:
    """Of each: whether the run is paused, whether it is let be, whether drawing is paused, whether the sample is."""
    run_ids = [work.run.id for work in works]
    paused, let_be = (which(tx, run_ids, now=NOW) for which in (pauses.paused_runs, pauses.waiting_runs))
    unpaused = pauses.unpaused(tx, now=NOW)
    every = select(tables.operation.c.id)
    drawn = set(tx.execute(every if unpaused is None else every.where(unpaused)).scalars())
    return [
        (
            work.run.id in paused,
            work.run.id in let_be,
            pauses.pausing(tx, work.sampling.id, now=NOW) is not None,
            work.sample.id not in drawn,
        )
        for work in works
    ]


@pytest.mark.parametrize("scope", Scope)
def test_a_spent_cap_pauses_the_runs_and_samples_of_its_scope_and_no_others(database: Database, scope: Scope) -> None:
    with database.begin() as tx:
        # Given
        covered = Work.make(tx, project_id="p", api_key_id=7, tags=["batch:b"])
        other = Work.make(tx, project_id="q", api_key_id=8, tags=["batch:c"])
        assert waiting(tx, covered, other) == [(False,) * 4] * 2
        # When
        budget = spend(tx, covered, scope)
        # Then
        assert waiting(tx, covered, other) == [(True,) * 4, (scope is Scope.ACCOUNT,) * 4]
        # When
        budgets.set_cap(tx, covered.run.account_id, budget.id, money.SCALE, now=NOW)
        # Then
        assert waiting(tx, covered, other) == [(False,) * 4] * 2


def test_thousands_of_spent_caps_pause_what_they_cover_and_nothing_else(database: Database) -> None:
    with database.begin() as tx:
        # Given: runs that ended long ago, whose caps are still there
        covered, other = Work.make(tx), Work.make(tx)
        first = budgets.add(tx, covered.run.account_id, Scope.RUN, "ended", cap=0, now=NOW)
        table = billing_tables.budget
        row = tx.execute(select(table).where(table.c.id == first.id)).one()._mapping
        alike = {name: value for name, value in row.items() if name != "id"}
        tx.execute(insert(table), [{**alike, "scope_id": f"ended {number}"} for number in range(2_000)])
        assert waiting(tx, covered, other) == [(False,) * 4] * 2
        # When
        spend(tx, covered, Scope.RUN)
        # Then
        assert waiting(tx, covered, other) == [(True,) * 4, (False,) * 4]


def test_a_cap_whose_period_is_over_pauses_no_sample(database: Database) -> None:
    with database.begin() as tx:
        work = Work.make(tx)
        budgets.add(
            tx, work.run.account_id, Scope.RUN, work.run.id, cap=0, now=NOW - timedelta(days=1), period=Period.DAY
        )
        budget = spend(tx, work, Scope.SESSION)
        assert waiting(tx, work) == [(True,) * 4]
        budgets.remove(tx, work.run.account_id, budget.id, now=NOW)
        tx.execute(update(billing_tables.budget).values(cap=1, spent=1))
        # Then: what was spent yesterday is not spent today
        assert waiting(tx, work) == [(False,) * 4]


def test_a_paused_account_takes_no_place_from_others(database: Database) -> None:
    with database.begin() as tx:
        # Given: it has waited longest and has nothing running
        paused, many, one = (make_sampling_session(tx, make_session(tx, make_account(tx, name))) for name in "abc")
        make_sample(tx, paused)
        for seq in range(5):
            make_sample(tx, many, seq)
        last = make_sample(tx, one)
        budgets.add(tx, paused.account_id, Scope.ACCOUNT, paused.account_id, cap=0, now=NOW)
        # When: one is claimed at a time
        claimed = []
        for _ in range(7):
            among = pauses.unpaused(tx, now=NOW)
            asked: dict[str, Any] = {
                "worker_id": "w",
                "limit": 1,
                "now": NOW,
                "expires_at": LATER,
                "skip_locked": False,
            }
            claimed += claims.claim_samples(tx, among=among, **asked)
        # Then
        assert [operation.account_id for operation in claimed] == [
            many.account_id,
            one.account_id,
            *[many.account_id] * 4,
        ]
        assert claimed[1].id == last.id


def test_a_soft_cap_pauses_nothing(database: Database) -> None:
    with database.begin() as tx:
        work = Work.make(tx)
        spend(tx, work, Scope.RUN, is_hard=False)
        assert waiting(tx, work) == [(False,) * 4]


def test_a_paused_run_may_save_its_weights(database: Database) -> None:
    with database.begin() as tx:
        # Given: what comes next costs nothing, what follows does
        run = make_run(tx)
        make_operation(tx, run, 0, kind="save_state")
        make_operation(tx, run, 1)
        budgets.add(tx, run.account_id, Scope.RUN, run.id, cap=0, now=NOW)
        # Then
        assert set(pauses.paused_runs(tx, [run.id], now=NOW)) == {run.id}
        assert pauses.waiting_runs(tx, [run.id], now=NOW) == {}

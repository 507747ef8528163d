"""Everybody who writes the bill at once: nothing is lost or counted twice, and no two wait for each other."""

from __future__ import annotations

import functools
import itertools
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import event, func, select
from sqlalchemy.engine import ExceptionContext

from billing import budget_checks, budgets, closing, ledger, money, rate_cards, rollups, verify
from billing.budgets import Period, Scope
from billing.dimensions import Dimensions
from billing.ledger import EntryKind, NewEntry
from jobs.backlog import Backlog
from jobs.cancel import cancel_sample
from jobs.operations import Failure, Kind, OptimStepOutcome
from jobs.settings import JobsSettings
from jobs.submit import Submitter
from storage import billing_tables, claims, journal, leases, runs, tables, workers
from storage.journal import FINAL
from storage.leases import Lease
from storage.migrate import migrate
from storage.open import Storage, open_storage
from storage.runs import Run, SamplingSession
from storage.settings import StorageSettings
from tests.announcements import Announcements
from tests.contracts.test_database import at_once
from tests.factories import (
    make_optim_step,
    make_run,
    make_sample_body,
    make_sampling_session,
    make_session,
    make_usage,
)
from tests.worker.stand_ins import make_meter
from worker.commit import Committer, Done, RunCommit, SampleCommit

STEPS = 15
"""Operations of each run, and samples of each sampling session."""
DEADLOCK = "40P01"
CARD = '[device_seconds]\n"*" = "0.01"\n[million_tokens."*"]\ntrained = "3"\nsampled = "7"\n'


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.servers)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """Storage with nothing in it, on either database."""
    url = ""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("migrated_sqlite"), tmp_path)
    else:
        url = str(request.getfixturevalue("fresh_database_url"))
    opened = open_storage(StorageSettings(data_dir=tmp_path, database_url=url, object_store_url=""))
    migrate(opened.database)
    yield opened
    opened.close()


@dataclass(frozen=True)
class Scene:
    """An account with runs, samples and budgets, and a worker that holds all of it."""

    storage: Storage
    account_id: str
    runs: Sequence[Run]
    samplings: Sequence[SamplingSession]
    leases: Sequence[Lease]
    submitter: Submitter
    ended: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def set(cls, storage: Storage) -> Scene:
        database = storage.database
        with database.begin() as tx:
            now = database.now(tx)
            rate_cards.add(tx, CARD, now=now - timedelta(days=1))
            sessions = [make_session(tx, project_id=f"project {place}", now=now) for place in range(2)]
            trained = [make_run(tx, session=one, model_seq_id=place, now=now) for one in sessions for place in range(2)]
            sampled = [make_sampling_session(tx, one, now=now) for one in sessions]
            account_id = sessions[0].account_id
            workers.register(tx, worker_id="w", host="h", pid=1, device="cpu", now=now)
            later = database.after(tx, 3600)
            held = [leases.acquire(tx, run.id, worker_id="w", now=now, expires_at=later) for run in trained]
            cap = 10**6 * money.SCALE
            for scope, of in [(Scope.ACCOUNT, account_id), *((Scope.RUN, run.id) for run in trained)]:
                budgets.add(tx, account_id, scope, of, cap=cap, now=now, period=Period.DAY)
        submitter = Submitter(storage, Announcements(), Backlog.of(database, JobsSettings()))
        scene = cls(storage, account_id, trained, sampled, held, submitter)
        for run in trained:
            submitter.training(run, 0, make_optim_step(), kind=Kind.OPTIM_STEP)
        return scene

    # ------------------------------------------------------------------------------------------------- what each does

    def train(self, place: int) -> None:
        """A client trains a run."""
        for seq in range(1, STEPS):
            self.submitter.training(self.runs[place], seq, make_optim_step(), kind=Kind.OPTIM_STEP)

    def sample(self, place: int) -> None:
        """A client samples, and cancels some of it."""
        sampling, database = self.samplings[place], self.storage.database
        for seq in range(STEPS):
            request_id = self.submitter.sample(sampling, seq, make_sample_body(), num_samples=1).request_id
            if seq % 3 == 2:
                with database.begin() as tx:
                    cancel_sample(tx, request_id, account_id=self.account_id, now=database.now(tx))

    def work(self) -> None:
        """The engine's thread commits what there is, until all has an outcome."""
        committer = Committer(self.storage, make_meter(), worker_id="w", publish=lambda _: None)
        while not self.ended.is_set():
            self._commit_runs(committer)
            self._commit_samples(committer)
            if self.num_done() == len(self.runs) * STEPS + len(self.samplings) * STEPS:
                self.ended.set()

    def renew(self, _round: int) -> None:
        """The keeper's thread keeps leases and claims, as `EngineLoop.renew` does."""
        database = self.storage.database
        with database.read() as tx:
            claimed = [
                row.id for row in tx.execute(select(tables.operation.c.id).order_by(tables.operation.c.id.desc()))
            ]
        with database.begin() as tx:
            expires_at = database.after(tx, 3600)
            leases.renew(tx, self.leases, expires_at=expires_at)
            claims.renew_claims(tx, claimed, worker_id="w", expires_at=expires_at)
            workers.record_seen(tx, "w", now=database.now(tx))

    def pay(self, round_: int) -> None:
        """An operator books payments."""
        database = self.storage.database
        entry = NewEntry(EntryKind.TOP_UP, f"topup:{round_ // 2}", Dimensions(self.account_id), -(round_ // 2) - 1)
        with database.begin() as tx:
            ledger.append_once(tx, entry, now=database.now(tx))

    def cap(self, round_: int) -> None:
        """An operator adds, changes and removes caps."""
        database = self.storage.database
        with database.begin() as tx:
            budget = budgets.add(tx, self.account_id, Scope.PROJECT, "project 0", cap=10**18, now=database.now(tx))
        with database.begin() as tx:
            budgets.set_cap(tx, self.account_id, budget.id, 2 * 10**18, now=database.now(tx))
        if round_ % 2:
            with database.begin() as tx:
                budgets.remove(tx, self.account_id, budget.id, now=database.now(tx))

    def keep_the_bill(self, round_: int) -> None:
        """The scheduler's jobs."""
        database = self.storage.database
        if round_ % 5 == 4:
            rollups.rebuild(database, pass_s=0)
        rollups.roll_up(database, pass_s=0, batch=7)
        budget_checks.release_leftovers(database)
        budgets.begin_periods(database)
        with database.begin() as tx:
            now = database.now(tx)
            closing.close(tx, self.account_id, end=now, now=now)

    def num_done(self) -> int:
        """How many operations have an outcome."""
        table = tables.operation
        with self.storage.database.read() as tx:
            done = select(func.count()).select_from(table).where(table.c.status.in_(FINAL))
            return int(tx.execute(done).scalar_one())

    def _commit_runs(self, committer: Committer) -> None:
        commits = []
        with self.storage.database.read() as tx:
            for run, lease in zip(self.runs, self.leases, strict=True):
                seq = runs.get_run(tx, run.id).state_seq
                done = [
                    Done(each, Failure("change this") if each.seq % 4 == 3 else OptimStepOutcome({}), make_usage())
                    for each in journal.next_in_order(tx, run.id, after_seq=seq, limit=3)
                ]
                commits += [RunCommit(run, lease, done)] if done else []
        if commits:
            assert not committer.commit_runs(commits)

    def _commit_samples(self, committer: Committer) -> None:
        database = self.storage.database
        with database.begin() as tx:
            claimed = claims.claim_samples(
                tx,
                worker_id="w",
                limit=4,
                now=database.now(tx),
                expires_at=database.after(tx, 3600),
                skip_locked=not database.is_sqlite,
            )
        by_id = {sampling.id: sampling for sampling in self.samplings}
        committer.commit_samples(
            [
                SampleCommit(each, by_id[str(each.sampling_session_id)], Failure("change this"), make_usage())
                for each in reversed(claimed)
            ]
        )


def test_whoever_writes_the_bill_at_the_same_time_it_adds_up_and_nobody_is_locked_out(storage: Storage) -> None:
    # Given
    scene = Scene.set(storage)
    deadlocks: list[str] = []

    def note(context: ExceptionContext) -> None:
        if getattr(context.original_exception, "sqlstate", None) == DEADLOCK:
            deadlocks.append(str(context.statement))

    event.listen(storage.database.engine, "handle_error", note)
    # When
    once: list[Callable[[], None]] = [
        *(functools.partial(scene.train, place) for place in range(len(scene.runs))),
        *(functools.partial(scene.sample, place) for place in range(len(scene.samplings))),
        scene.work,
    ]
    again_and_again = [scene.renew, scene.pay, scene.cap, scene.keep_the_bill]

    def go(place: int) -> None:
        try:
            if place < len(once):
                once[place]()
            else:
                for round_ in itertools.takewhile(lambda _: not scene.ended.is_set(), itertools.count()):
                    again_and_again[place - len(once)](round_)
        except BaseException:
            scene.ended.set()
            raise

    at_once(go, len(once) + len(again_and_again))
    # Then
    assert deadlocks == []
    database = storage.database
    rollups.roll_up(database, pass_s=60)
    with database.read() as tx:
        assert list(verify.differences(tx)) == []  # charges, invoices, and what budgets have spent and hold
        assert all(one.held == 0 for one in budgets.list_budgets(tx, [scene.account_id], now=database.now(tx)))
        charged = select(func.count()).select_from(billing_tables.usage_record)
        completed = select(func.count()).where(tables.operation.c.status == journal.Status.COMPLETED)
        assert tx.execute(charged).scalar_one() == tx.execute(completed).scalar_one() > 0

"""Which samples are claimed when: together, or a suspect alone; nobody waits for ever."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import select, update

from billing import budgets
from billing.budgets import Scope
from jobs import operations
from jobs.operations import Failure, SampleOutcome
from storage import billing_tables, claims, journal, tables
from storage.clock import FrozenClock
from storage.errors import DatabaseUnavailableError, ObjectStoreUnavailableError
from storage.journal import Operation, Status
from storage.open import Storage
from storage.payloads import Stored
from tests.contracts.ledger_kit import pay, price_seconds
from tests.factories import make_account, make_sample, make_sample_body, make_sampling_session, make_session
from tests.worker.stand_ins import make_meter
from worker.commit import Committer
from worker.sample_feeder import SampleFeeder, SuspectTurns
from worker.sample_turn import ClaimedSample, SampleTurn
from worker.sampler.reports import Finished, SamplerStep

SEATS = 2


@dataclass
class Seats:
    """A sampler with two seats: a request takes one in a step, and ends in the next."""

    waiting: list[str] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.drawn)

    def submit(self, request_id: str, *_: Any, **__: Any) -> None:
        self.waiting.append(request_id)

    def is_waiting(self, request_id: str) -> bool:
        return request_id in self.waiting

    def cancel(self, request_id: str) -> None:
        for requests in (self.waiting, self.drawn):
            if request_id in requests:
                requests.remove(request_id)

    def step(self) -> SamplerStep:
        done, self.drawn, self.waiting = self.drawn, self.waiting[:SEATS], self.waiting[SEATS:]
        finished = [Finished(request_id, SampleOutcome(()), tokens_sampled=1) for request_id in done]
        return SamplerStep(finished, dict.fromkeys([*done, *self.drawn], 1), 0, 0)


class Models:
    """In the place of base models and adapters in memory."""

    base = SimpleNamespace(name="tiny")

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.sampler = Seats()

    def get(self, *_: Any, **__: Any) -> Models:
        """Itself, or the error."""
        if self.error is not None:
            raise self.error
        return self


class Bench:
    """A feeder whose samples stay where they are put."""

    def __init__(self, storage: Storage, *, samples_max: int = 100) -> None:
        self.storage = storage
        self.models = Models()
        meter = make_meter()
        self.committer = Committer(storage, meter, worker_id="w", publish=lambda _: None)
        self.turn = SampleTurn(self.committer, meter, worker_id="w", device="cpu")
        self.feeder = SampleFeeder(
            storage,
            self.models,  # type: ignore[arg-type]
            self.models,  # type: ignore[arg-type]
            self.turn,
            worker_id="w",
            claim_s=10,
            samples_max=samples_max,
            in_use=set,
        )

    def queue(self, *, suspects: int, innocents: int) -> list[Operation]:
        """Samples, the suspects before the others."""
        payload = operations.encode(make_sample_body())
        with self.storage.database.begin() as tx:
            session = make_sampling_session(tx)
            stored = Stored(inline=payload, size_bytes=len(payload))
            queued = [make_sample(tx, session, seq, payload=stored) for seq in range(suspects + innocents)]
            ids = [operation.id for operation in queued[:suspects]]
            tx.execute(update(tables.operation).where(tables.operation.c.id.in_(ids)).values(suspect=True))
        return queued

    def queue_of(self, account: str, number: int) -> list[Operation]:
        """Samples of an account of this name."""
        payload = operations.encode(make_sample_body())
        with self.storage.database.begin() as tx:
            session = make_sampling_session(tx, make_session(tx, make_account(tx, account)))
            stored = Stored(inline=payload, size_bytes=len(payload))
            return [make_sample(tx, session, seq, payload=stored) for seq in range(number)]

    def step(self) -> None:
        """A turn of the engine."""
        self.turn.admit()
        if self.turn.accounts():
            self.turn.take(self.models)  # type: ignore[arg-type]  # `Models` stands in for a base model in memory

    def draw(self) -> None:
        """Feed, and draw all that is claimed, until nothing is left that may be drawn."""
        for _ in range(50):
            self.feed()
            self.step()
            while self.turn.accounts():
                self.step()
            if not self.turn.claims():
                return
        raise AssertionError("there is no end")

    def statuses(self, queued: list[Operation]) -> list[str]:
        """Where operations stand."""
        return [_row(self, operation).status for operation in queued]

    def set(self, operation: Operation, **values: Any) -> None:
        """Change a row."""
        with self.storage.database.begin() as tx:
            tx.execute(update(tables.operation).where(tables.operation.c.id == operation.id).values(**values))

    def feed(self) -> list[int]:
        """Let the feeder claim what it wants; the `seq`s that the worker holds then."""
        while self.feeder._feed():
            pass
        return [operation.seq for operation in self.turn.claims().values()]

    def finish(self) -> None:
        """Everything that the worker holds is done."""
        with self.storage.database.begin() as tx:
            for operation in self.turn.claims().values():
                journal.complete(tx, operation, Stored(), worker_id="w", now=self.storage.database.now(tx))
        self.turn._arrived.clear()

    def arrived(self) -> list[ClaimedSample]:
        """What waits for the engine."""
        return self.turn._arrived


@pytest.fixture
def bench(storage: Storage) -> Iterator[Bench]:
    """A feeder on an empty journal, whose turns of suspects are always due."""
    made = Bench(storage)
    made.feeder._suspects = SuspectTurns(now=lambda: 0.0)
    return made


def test_a_suspect_is_drawn_alone_before_others_are_claimed(bench: Bench) -> None:
    # given a suspect that is older than the others
    bench.queue(suspects=1, innocents=3)

    # then it is claimed alone, and the others once it is done
    assert bench.feed() == [0]
    with bench.storage.database.read() as tx:
        assert journal.list_operations(tx, "none", limit=1) == []
    bench.finish()
    assert bench.feed() == [1, 2, 3]


def test_samples_that_a_cap_pauses_are_not_claimed_until_there_is_room(bench: Bench) -> None:
    # given samples of an account that has spent what it may
    (first, *_) = bench.queue(suspects=1, innocents=2)
    with bench.storage.database.begin() as tx:
        now = bench.storage.database.now(tx)
        budget = budgets.add(tx, first.account_id, Scope.ACCOUNT, first.account_id, cap=0, now=now)

    # then none is claimed
    assert bench.feed() == []

    # and when the cap is raised, all are
    with bench.storage.database.begin() as tx:
        budgets.set_cap(tx, first.account_id, budget.id, 1, now=now)
    assert bench.feed() == [0]
    bench.finish()
    assert bench.feed() == [1, 2]


def test_what_is_claimed_when_a_cap_is_spent_waits_for_room_and_holds_up_nobody_else(bench: Bench) -> None:
    # given a worker that has claimed six samples of an account that the first will ruin, and three of another one
    mine, others = bench.queue_of("poor", 6), bench.queue_of("rich", 3)
    database = bench.storage.database
    with database.begin() as tx:
        price_seconds(tx, now=database.now(tx))
        budgets.add(tx, mine[0].account_id, Scope.ACCOUNT, mine[0].account_id, cap=1, now=database.now(tx))
    bench.feed()
    assert bench.statuses(mine + others) == ["running"] * 9

    # when they are drawn, two at a time
    bench.draw()

    # then two were begun when the cap was spent and two more in the step that spent it; the others wait as if they had
    # never been claimed, and the other account's are done
    assert bench.statuses(mine) == ["completed"] * 4 + ["queued"] * 2
    assert [_row(bench, operation).attempts for operation in mine] == [1, 1, 1, 1, 0, 0]
    assert bench.statuses(others) == ["completed"] * 3

    # and once it is paid for they are drawn too, and each is billed once
    with database.begin() as tx:
        pay(tx, mine[0].account_id, "topup:1", 10**15, at=database.now(tx))
    bench.draw()
    assert bench.statuses(mine) == ["completed"] * 6
    with database.read() as tx:
        record = billing_tables.usage_record.c
        billed = tx.execute(select(record.operation_id, record.attempt).order_by(record.operation_id)).all()
    assert [tuple(row) for row in billed] == [(operation.id, 1) for operation in mine + others]


def test_a_worker_without_room_sees_that_others_have_spent_a_cap(storage: Storage) -> None:
    # given a worker that draws two samples of all the five that it may claim
    bench = Bench(storage, samples_max=5)
    mine = bench.queue_of("poor", 6)
    bench.feed()
    bench.step()

    # when the cap is spent by somebody else
    with storage.database.begin() as tx:
        now = storage.database.now(tx)
        budgets.add(tx, mine[0].account_id, Scope.ACCOUNT, mine[0].account_id, cap=0, now=now)
    bench.feeder._looked_at = float("-inf")
    bench.feed()
    assert bench.turn.admit()
    bench.draw()

    # then only what was being drawn is
    assert bench.statuses(mine) == ["completed"] * 2 + ["queued"] * 4


def test_what_is_still_loaded_when_a_cap_is_spent_is_not_begun(bench: Bench) -> None:
    # given samples that are claimed, and a cap that a commit finds spent before they have arrived
    mine = bench.queue_of("poor", 2)
    with bench.storage.database.begin() as tx:
        now = bench.storage.database.now(tx)
        budget = budgets.add(tx, mine[0].account_id, Scope.ACCOUNT, mine[0].account_id, cap=0, now=now)
        budgets.set_cap(tx, mine[0].account_id, budget.id, 1, now=now)
    bench.feed()
    bench.committer.on_spent([budget])

    # then they are withheld, and nothing of them is in the sampler
    assert bench.turn.admit()
    assert ([one.id for one in bench.turn.withheld()], bench.models.sampler.has_work) == (
        [one.id for one in mine],
        False,
    )

    # and when it turns out that there is room, they are drawn
    bench.draw()
    assert bench.statuses(mine) == ["completed"] * 2


def test_claims_that_cannot_be_given_back_are_kept_until_they_can(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given samples that are withheld
    mine = bench.queue_of("poor", 2)
    bench.feed()
    with bench.storage.database.begin() as tx:
        now = bench.storage.database.now(tx)
        budget = budgets.add(tx, mine[0].account_id, Scope.ACCOUNT, mine[0].account_id, cap=0, now=now)
    bench.committer.on_spent([budget])
    bench.turn.admit()

    # when the database does not answer
    def gone(*_: Any, **__: Any) -> None:
        raise DatabaseUnavailableError("the database", "away")

    with monkeypatch.context() as patched:
        patched.setattr(claims, "give_back", gone)
        with pytest.raises(DatabaseUnavailableError):
            bench.feed()

    # then they are renewed, and given back when it does
    assert sorted(bench.turn.claims()) == [operation.id for operation in mine]
    assert bench.feed() == []
    assert bench.statuses(mine) == ["queued"] * 2


def test_no_others_are_claimed_until_what_is_held_is_done_and_the_suspect_too(bench: Bench) -> None:
    # given a worker that draws samples
    bench.queue(suspects=0, innocents=2)
    assert bench.feed() == [0, 1]

    # when a suspect and more samples are queued
    bench.queue(suspects=1, innocents=2)

    # then it waits until the worker holds nothing else, and the others wait for it
    assert bench.feed() == [0, 1]
    bench.finish()
    assert bench.feed() == [0]
    assert [claimed.operation.suspect for claimed in bench.arrived()] == [True]
    bench.finish()
    assert bench.feed() == [1, 2]


def test_what_is_claimed_alone_is_written_down_as_alone(bench: Bench) -> None:
    # given
    suspect, innocent = bench.queue(suspects=1, innocents=1)

    # when both are drawn, one after the other
    bench.feed()
    alone = _row(bench, suspect).alone
    bench.finish()
    bench.feed()

    # then
    assert (alone, _row(bench, innocent).alone) == (True, False)


def test_between_suspects_others_have_as_long_as_one_took(storage: Storage, clock: FrozenClock) -> None:
    # given two suspects, and enough others
    bench = Bench(storage)
    bench.feeder._suspects = SuspectTurns(now=lambda: clock.now().timestamp())
    bench.queue(suspects=2, innocents=1)

    # when the first suspect has taken 5 s
    assert bench.feed() == [0]
    clock.advance(5)
    bench.finish()

    # then others are claimed for 5 s, however many they are, and then the second suspect has its turn
    for _ in range(5):
        assert 1 not in bench.feed()
        bench.finish()
        bench.queue(suspects=0, innocents=1)
        clock.advance(1)
    bench.finish()
    assert bench.feed() == [1]


def test_a_suspect_for_which_nobody_waits_need_not_wait(storage: Storage, clock: FrozenClock) -> None:
    # given two suspects and nothing else
    bench = Bench(storage)
    bench.feeder._suspects = SuspectTurns(now=lambda: clock.now().timestamp())
    bench.queue(suspects=2, innocents=0)

    # when one has been drawn for long
    assert bench.feed() == [0]
    clock.advance(100)
    bench.finish()

    # then the next one follows at once
    assert bench.feed() == [1]


def test_a_sample_that_has_ended_too_many_workers_fails_unread(bench: Bench) -> None:
    # given a suspect with three crashes
    (sample,) = bench.queue(suspects=1, innocents=0)
    bench.set(sample, blame=3_00_00_00, payload=b"not to be read")

    # when it is claimed
    bench.feed()

    # then it arrives as a failure with words
    (claimed,) = bench.arrived()
    assert isinstance(claimed.work, Failure)
    assert "ended its worker 3 times while it ran alone (3 x it crashed" in claimed.work.error


def test_claims_that_storage_cannot_serve_are_given_back_and_held_against_nobody(bench: Bench) -> None:
    # given an object store that is away
    (sample,) = bench.queue(suspects=1, innocents=0)
    bench.models.error = ObjectStoreUnavailableError("store", "away")

    # when samples are claimed
    with pytest.raises(ObjectStoreUnavailableError):
        bench.feed()

    # then they wait again at once
    left = _row(bench, sample)
    assert (left.status, left.blame, bench.turn.claims()) == (Status.QUEUED, 0, {})
    with bench.storage.database.begin() as tx:
        later = bench.storage.database.now(tx) + timedelta(seconds=100)
        assert claims.release_claims(tx, now=later) == 0


def _row(bench: Bench, operation: Operation) -> Operation:
    with bench.storage.database.read() as tx:
        return journal.get_operation(tx, operation.request_id)

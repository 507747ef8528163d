"""Which samples are claimed when: together, or a suspect alone; nobody waits for ever."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update

from billing import budgets
from billing.budgets import Scope
from jobs import operations
from jobs.operations import Failure
from storage import claims, journal, tables
from storage.clock import FrozenClock
from storage.errors import ObjectStoreUnavailableError
from storage.journal import Operation, Status
from storage.open import Storage
from storage.payloads import Stored
from tests.factories import make_sample, make_sample_body, make_sampling_session
from tests.worker.stand_ins import make_meter
from worker.sample_feeder import SampleFeeder, SuspectTurns
from worker.sample_turn import ClaimedSample, SampleTurn


class Models:
    """In the place of base models and adapters in memory."""

    base = None

    def __init__(self) -> None:
        self.error: Exception | None = None

    def get(self, *_: Any, **__: Any) -> Models:
        """Itself, or the error."""
        if self.error is not None:
            raise self.error
        return self


class Bench:
    """A feeder whose samples stay where they are put."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.models = Models()
        self.turn = SampleTurn(None, make_meter(), worker_id="w", device="cpu")  # type: ignore[arg-type]
        self.feeder = SampleFeeder(
            storage,
            self.models,  # type: ignore[arg-type]
            self.models,  # type: ignore[arg-type]
            self.turn,
            worker_id="w",
            claim_s=10,
            samples_max=100,
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

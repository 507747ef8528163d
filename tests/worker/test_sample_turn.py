"""Samples are committed by whoever holds their claim, and one that breaks a step fails alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from billing.dimensions import Dimensions
from jobs.operations import Failure, Sample, SampleOutcome
from storage.journal import Operation, Status
from storage.payloads import Stored
from storage.runs import SamplingSession
from worker.commit import SampleCommit
from worker.sample_turn import ClaimedSample, Drawable, SampleTurn
from worker.sampler.reports import Finished, SamplerStep
from worker.work_meter import WorkMeter

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class PretendSampler:
    """Ends everything in one step of 100 ns; raises while a request of `poison` is inside."""

    poison: frozenset[str] = frozenset()
    inside: list[str] = field(default_factory=list)

    @property
    def has_work(self) -> bool:
        return bool(self.inside)

    def submit(self, request_id: str, body: Sample, adapter: Any, *, scope: str) -> None:
        self.inside.append(request_id)

    def is_waiting(self, request_id: str) -> bool:
        return request_id in self.inside

    def cancel(self, request_id: str) -> None:
        if request_id in self.inside:
            self.inside.remove(request_id)

    def step(self) -> SamplerStep:
        if self.poison & set(self.inside):
            raise MemoryError("no memory left")
        done, self.inside = self.inside, []
        finished = [Finished(request_id, SampleOutcome(()), tokens_sampled=1) for request_id in done]
        return SamplerStep(finished, dict.fromkeys(done, 1), 0, 100)


class PretendClock:
    """Every block takes 100 ns."""

    busy_ns = 0

    @contextmanager
    def measure(self) -> Iterator[SimpleNamespace]:
        measured = SimpleNamespace(device_ns=0)
        try:
            yield measured
        finally:
            measured.device_ns = 100
            self.busy_ns += 100


@dataclass
class PretendCommitter:
    """Remembers what was committed; what is in `discards` turns out to be another's."""

    committed: dict[str, SampleCommit] = field(default_factory=dict)
    discards: set[str] = field(default_factory=set)

    def commit_samples(self, commits: list[SampleCommit]) -> set[str]:
        self.committed |= {commit.operation.request_id: commit for commit in commits}
        return self.discards & set(self.committed)


def make_claimed(name: str, model: Any, *, account: str = "acme", attempt: int = 1) -> ClaimedSample:
    """A sample in memory."""
    operation = Operation(
        id=sum(name.encode()),
        request_id=name,
        account_id=account,
        run_id=None,
        sampling_session_id="s",
        seq=0,
        kind="sample",
        base_model="tiny",
        status=Status.RUNNING,
        payload=Stored(),
        outcome=Stored(),
        loads_key=None,
        error=None,
        error_category=None,
        failures_seen=0,
        failure_number=None,
        num_sequences=1,
        attempts=attempt,
        suspect=False,
        alone=False,
        blame=0,
        worker_id="w",
        accepted_at=NOW,
        started_at=NOW,
        finished_at=None,
        expired=False,
    )
    session = SamplingSession("s", account, "session", 0, None, "tiny", None, None, None, NOW, None)
    work = Drawable(Sample(np.array([1, 2])), model, None)
    return ClaimedSample(operation, session, Dimensions(account), work)


@pytest.fixture
def committer() -> PretendCommitter:
    return PretendCommitter()


@pytest.fixture
def meter() -> WorkMeter:
    return WorkMeter("w", PretendClock())  # type: ignore[arg-type]


@pytest.fixture
def turn(committer: PretendCommitter, meter: WorkMeter) -> SampleTurn:
    return SampleTurn(committer, meter, worker_id="w", device="cpu")  # type: ignore[arg-type]


def make_model(**changes: Any) -> Any:
    """A base model in memory, as far as a turn looks."""
    return SimpleNamespace(
        sampler=PretendSampler(**changes), base=SimpleNamespace(name="tiny", device=torch.device("cpu"))
    )


def run_dry(turn: SampleTurn, model: Any) -> list[Any]:
    """Take turns until nothing is left."""
    reports = []
    while turn.accounts():
        reports.append(turn.take(model))
        assert len(reports) < 50
    return reports


def test_device_time_is_split_and_billed(turn: SampleTurn, committer: PretendCommitter, meter: WorkMeter) -> None:
    # given samples of two accounts
    model = make_model()
    for name, account in (("a", "acme"), ("b", "acme"), ("c", "other")):
        turn.arrive(make_claimed(name, model, account=account))
    turn.admit()

    # when they are drawn
    (report,) = run_dry(turn, model)

    # then the shares add up, and nothing of it is overhead
    assert report == {"acme": 67, "other": 33}
    assert (meter.clock.busy_ns, meter.work.overhead_ns) == (100, 0)
    assert sum(commit.usage.device_ns for commit in committer.committed.values()) == 100


def test_the_sample_that_breaks_a_step_fails_alone(turn: SampleTurn, committer: PretendCommitter) -> None:
    # given five samples, two of which break every step they are in
    model = make_model(poison=frozenset({"b", "d"}))
    for name in "abcde":
        turn.arrive(make_claimed(name, model))
    turn.admit()

    # when they are drawn, and another one comes in the meantime
    turn.take(model)
    turn.arrive(make_claimed("f", model))
    turn.admit()
    run_dry(turn, model)

    # then those two have failed, and the others have not
    failed = {name for name, commit in committer.committed.items() if isinstance(commit.outcome, Failure)}
    assert failed == {"b", "d"}
    assert set(committer.committed) == set("abcdef")


def test_what_breaks_a_step_is_overhead_and_what_is_inside_is_under_way(turn: SampleTurn, meter: WorkMeter) -> None:
    # given two samples, one of which breaks every step it is in
    model = make_model(poison=frozenset({"b"}))
    for name in "ab":
        turn.arrive(make_claimed(name, model))
    turn.admit()
    assert meter.under_way_ns() == 0

    # when they are drawn: together, which breaks, then each alone
    run_dry(turn, model)

    # then only the step in which the good one was alone is billed
    assert (meter.clock.busy_ns, meter.work.overhead_ns, meter.under_way_ns()) == (300, 200, 0)


def test_a_cancelled_sample_leaves_the_engine(turn: SampleTurn, committer: PretendCommitter) -> None:
    # given a sample in the engine
    model = make_model()
    claimed = make_claimed("a", model)
    turn.arrive(claimed)
    turn.admit()
    assert list(turn.claims()) == [claimed.operation.id]

    # when its claim does not stand any more
    turn.note_lost([claimed.operation])
    turn.admit()

    # then nothing of it is left, and nothing is committed
    assert (turn.claims(), turn.accounts(), model.sampler.inside) == ({}, set(), [])
    assert committer.committed == {}


def test_a_loss_that_is_noticed_late_does_not_end_the_next_claim(turn: SampleTurn) -> None:
    # given a sample that was claimed, lost, and claimed again
    model = make_model()
    first, second = make_claimed("a", model), make_claimed("a", model)
    turn.arrive(second)
    turn.admit()

    # when the loss of the first claim is noticed
    turn.note_lost([first.operation])
    turn.admit()

    # then the sample is still drawn
    assert model.sampler.inside == ["a"]


def test_a_sample_claimed_again_starts_over_as_the_new_attempt(turn: SampleTurn, committer: PretendCommitter) -> None:
    # given a sample in the engine whose claim expired, and which this worker has claimed again
    model = make_model()
    for attempt in (1, 2):
        turn.arrive(make_claimed("a", model, attempt=attempt))
        turn.admit()
    assert model.sampler.inside == ["a"]

    # when it is drawn
    run_dry(turn, model)

    # then it is committed once, as the second attempt
    assert committer.committed["a"].usage.attempt == 2


def test_claims_are_kept_from_the_claim_to_the_arrival(turn: SampleTurn) -> None:
    # given samples that are claimed and still being loaded
    model = make_model()
    first, second = make_claimed("a", model), make_claimed("b", model)
    turn.expect([first.operation, second.operation])
    assert len(turn) == 2

    # when one arrives and the other cannot be loaded
    turn.arrive(first)
    turn.admit()
    turn.forget([first.operation, second.operation])

    # then only the first is kept
    assert list(turn.claims()) == [first.operation.id]

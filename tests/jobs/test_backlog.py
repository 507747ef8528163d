"""What waits is bounded, per account and in all; counting it is cheap, and waits for nobody."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest

from jobs import backlog as backlogs
from jobs.backlog import Backlog, BacklogFullError
from jobs.operations import Kind
from jobs.settings import JobsSettings
from storage.errors import DatabaseUnavailableError
from storage.journal import Amount

SETTINGS = JobsSettings(
    queued_max_per_account=4,
    queued_max=6,
    queued_bytes_max_per_account=1000,
    queued_bytes_max=1500,
    queued_training_factor=2,
)
PATIENCE_S = 60.0


class Journal:
    """In the journal's place: what it would count, and how often it was asked."""

    def __init__(self, **waiting: Amount) -> None:
        self.waiting: dict[str, Amount] = waiting
        self.counts = 0
        self.error: Exception | None = None

    def count(self) -> Mapping[str, Amount]:
        self.counts += 1
        if self.error is not None:
            raise self.error
        return dict(self.waiting)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Monotonic time, moved by the test."""
    now = [100.0]
    monkeypatch.setattr("jobs.backlog.time.monotonic", lambda: now[0])
    return now


def accept(backlog: Backlog, account: str = "a", kind: Kind = Kind.SAMPLE, payload_bytes: int = 10) -> None:
    with backlog.place(account, kind, payload_bytes):
        pass


def num_taken(backlog: Backlog, account: str, kind: Kind, payload_bytes: int = 10) -> int:
    """How many operations are taken before one is refused."""
    for number in range(100):
        try:
            accept(backlog, account, kind, payload_bytes)
        except BacklogFullError:
            return number
    raise AssertionError("no limit")


@pytest.mark.parametrize(
    ("waiting", "kind", "payload_bytes", "taken"),
    [
        ({}, Kind.SAMPLE, 10, 4),  # operations of the account
        ({}, Kind.OPTIM_STEP, 10, 8),  # twice as many of training
        ({}, Kind.SAMPLE, 400, 3),  # bytes: 0, 400 and 800 are below 1000
        ({"a": Amount(3, 0)}, Kind.SAMPLE, 10, 1),  # what waited before counts
        ({"b": Amount(5, 0)}, Kind.SAMPLE, 10, 1),  # that of others counts towards the limit of all
        ({"b": Amount(1, 1400)}, Kind.SAMPLE, 60, 2),
        ({"b": Amount(11, 0)}, Kind.FORWARD_BACKWARD, 10, 1),
    ],
)
def test_what_is_beyond_a_limit_is_refused(
    waiting: dict[str, Amount], kind: Kind, payload_bytes: int, taken: int, clock: list[float]
) -> None:
    assert num_taken(Backlog(Journal(**waiting).count, SETTINGS), "a", kind, payload_bytes) == taken


def test_samples_alone_keep_no_run_from_training(clock: list[float]) -> None:
    # Given
    backlog = Backlog(Journal().count, SETTINGS)
    assert num_taken(backlog, "a", Kind.SAMPLE) == 4
    # Then
    assert num_taken(backlog, "a", Kind.OPTIM_STEP) == 4


def test_a_refusal_says_whose_limit_it_is_and_when_to_try_again(clock: list[float]) -> None:
    backlog = Backlog(Journal(a=Amount(9, 0)).count, SETTINGS)
    with pytest.raises(
        BacklogFullError, match=r"this account has 9 operations waiting .* limit is 4.* in 1 s"
    ) as sample:
        accept(backlog)
    with pytest.raises(BacklogFullError, match="limit is 8") as step:
        accept(backlog, kind=Kind.OPTIM_STEP)
    with pytest.raises(BacklogFullError) as creation:
        accept(backlog, kind=Kind.CREATE_MODEL)
    assert [raised.value.retry_after_s for raised in (sample, step, creation)] == [1, 5, 30]


def test_there_is_room_again_once_the_journal_says_so(clock: list[float]) -> None:
    # Given
    journal = Journal(a=Amount(4, 0))
    backlog = Backlog(journal.count, SETTINGS)
    assert num_taken(backlog, "a", Kind.SAMPLE) == 0
    # When
    journal.waiting = {}
    assert num_taken(backlog, "a", Kind.SAMPLE) == 0  # not counted again yet
    clock[0] += backlogs.COUNT_EVERY_S
    # Then
    assert num_taken(backlog, "a", Kind.SAMPLE) == 4


def test_the_journal_is_counted_once_a_second_however_much_is_submitted(clock: list[float]) -> None:
    journal = Journal()
    backlog = Backlog(journal.count, JobsSettings())
    for _ in range(1000):
        accept(backlog)
        clock[0] += 0.003
    assert journal.counts == 3


def test_a_count_that_takes_long_is_made_less_often(clock: list[float]) -> None:
    # Given
    journal = Journal()

    def slowly() -> Mapping[str, Amount]:
        clock[0] += 0.5
        return journal.count()

    backlog = Backlog(slowly, SETTINGS)
    accept(backlog)
    # When
    clock[0] += 0.5 / backlogs.COUNT_SHARE_MAX - 0.1
    accept(backlog)
    assert journal.counts == 1
    clock[0] += 0.2
    accept(backlog)
    # Then
    assert journal.counts == 2


def test_what_was_not_accepted_in_the_end_takes_no_room(clock: list[float]) -> None:
    backlog = Backlog(Journal().count, SETTINGS)
    for _ in range(20):
        with pytest.raises(ZeroDivisionError), backlog.place("a", Kind.SAMPLE, 10):
            raise ZeroDivisionError
    assert num_taken(backlog, "a", Kind.SAMPLE) == 4


def test_what_is_accepted_while_another_thread_counts_is_not_forgotten_and_waits_for_no_count(
    clock: list[float],
) -> None:
    # Given: a count that hangs in the database, having seen nothing
    counting, go_on = threading.Event(), threading.Event()
    journal = Journal()

    def hang() -> Mapping[str, Amount]:
        seen = journal.count()
        if journal.counts == 2:
            counting.set()
            assert go_on.wait(PATIENCE_S)
        return seen

    backlog = Backlog(hang, SETTINGS)
    accept(backlog)
    journal.waiting = {"a": Amount(1, 10)}
    clock[0] += backlogs.COUNT_EVERY_S
    counter = threading.Thread(target=accept, args=(backlog,))
    counter.start()
    assert counting.wait(PATIENCE_S)
    # When: one more in the meantime
    accept(backlog)
    go_on.set()
    counter.join(PATIENCE_S)
    # Then: one that was counted, one in the meantime, one of the thread that counted: one is left of four
    assert num_taken(backlog, "a", Kind.SAMPLE) == 1


def test_of_many_threads_none_goes_over_the_limit() -> None:
    # Given
    backlog = Backlog(Journal().count, SETTINGS)
    inside, refused, out = threading.Semaphore(0), threading.Semaphore(0), threading.Event()

    def hold() -> None:
        try:
            with backlog.place("a", Kind.SAMPLE, 10):
                inside.release()
                assert out.wait(PATIENCE_S)
        except BacklogFullError:
            refused.release()

    threads = [threading.Thread(target=hold) for _ in range(12)]
    for thread in threads:
        thread.start()
    # When: all have either a place or a refusal
    got = [semaphore.acquire(timeout=PATIENCE_S) for semaphore in (*[inside] * 4, *[refused] * 8)]
    out.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    # Then
    assert all(got)


def test_a_journal_that_cannot_be_counted_forgets_nothing_of_what_was_accepted(clock: list[float]) -> None:
    # Given
    journal = Journal()
    backlog = Backlog(journal.count, SETTINGS)
    for _ in range(3):
        accept(backlog)
    # When
    journal.error = DatabaseUnavailableError("sqlite://", "away")
    clock[0] += backlogs.COUNT_EVERY_S
    with pytest.raises(DatabaseUnavailableError):
        accept(backlog)
    # Then
    journal.error, journal.waiting = None, {"a": Amount(3, 30)}
    assert num_taken(backlog, "a", Kind.SAMPLE) == 1

"""A thread begins with the first piece of work, does what there is until it is closed, and keeps nobody waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from jobs.thread_on_demand import ThreadOnDemand

PATIENCE_S = 60.0


class Desk:
    """Notes down numbers on a thread on demand."""

    def __init__(self) -> None:
        self.thread = ThreadOnDemand(self._work, name="desk")
        self.done: list[int] = []
        self.workers: set[int] = set()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self._waiting: list[int] = []

    def give(self, *numbers: int) -> None:
        """Have them noted down."""
        with self.thread.changed:
            self._waiting.extend(numbers)
            self.thread.wake()

    def close(self) -> None:
        """Wait until all is noted down."""
        self.thread.close(timeout_s=PATIENCE_S)

    def _work(self) -> None:
        self.workers.add(threading.get_ident())
        while True:
            with self.thread.changed:
                self.thread.wait_for(lambda: self._waiting)
                taken, self._waiting = self._waiting, []
            if not taken:
                return
            assert self.may_go_on.wait(PATIENCE_S)
            self.done.extend(taken)


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.may_go_on.set()
    made.close()


def _refuse(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_all_work_is_done_in_order_on_one_thread_before_it_is_closed(desk: Desk) -> None:
    # when
    for number in range(100):
        desk.give(number)
    desk.close()
    # then
    assert desk.done == list(range(100))
    assert len(desk.workers) == 1
    assert threading.get_ident() not in desk.workers


def test_without_work_there_is_no_thread(desk: Desk) -> None:
    desk.close()
    assert not desk.workers


def test_work_that_comes_after_it_was_closed_begins_no_thread(desk: Desk) -> None:
    # given
    desk.close()
    # when
    desk.give(1)
    # then
    desk.close()
    assert not desk.workers


def test_where_no_thread_can_be_begun_the_next_piece_of_work_tries_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given: this returns
    with monkeypatch.context() as starved:
        starved.setattr(threading.Thread, "start", _refuse)
        desk.give(1)
    # when
    desk.give(2)
    desk.close()
    # then
    assert desk.done == [1, 2]


def test_closing_where_no_thread_could_be_begun_returns(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", _refuse)
    desk.give(1)
    desk.close()
    assert desk.done == []


def test_closing_waits_no_longer_than_it_is_told(desk: Desk) -> None:
    # given: work that takes for ever
    desk.may_go_on.clear()
    desk.give(1)
    # when: this returns
    desk.thread.close(timeout_s=0.01)
    # then
    assert desk.done == []


def test_a_pause_lasts_until_it_is_over_or_cut_short_by_closing() -> None:
    # given
    cut_short: list[bool] = []
    paused = threading.Event()

    def work() -> None:
        cut_short.append(thread.pause(0.0))
        paused.set()
        cut_short.append(thread.pause(PATIENCE_S))

    thread = ThreadOnDemand(work, name="sleeper")
    with thread.changed:
        thread.wake()
    # when
    assert paused.wait(PATIENCE_S)
    thread.close(timeout_s=PATIENCE_S)
    # then
    assert cut_short == [False, True]

"""What is away is asked again, with pauses that grow up to a bound; who may not wait for ever does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from storage import retry
from storage.errors import DatabaseUnavailableError, ObjectStoreUnavailableError, RowNotFoundError
from storage.retry import retrying


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses made, while time passes by as much."""
    now, made = [0.0], list[float]()

    def sleep(seconds: float) -> None:
        made.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("storage.retry.time.sleep", sleep)
    monkeypatch.setattr("storage.retry.time.monotonic", lambda: now[0])
    return made


def failing(times: int) -> Callable[[], str]:
    errors = [DatabaseUnavailableError("sqlite://", "away"), ObjectStoreUnavailableError("s3://", "SlowDown")]
    left = [errors[number % 2] for number in range(times)]

    def call() -> str:
        if left:
            raise left.pop()
        return "answer"

    return call


def test_asks_until_there_is_an_answer_with_growing_pauses(pauses: list[float]) -> None:
    waited: list[int] = []
    assert retrying(failing(12), on_wait=lambda: waited.append(1)) == "answer"
    assert len(pauses) == len(waited) == 12
    assert pauses[0] <= retry.RETRY_FIRST_S
    assert retry.RETRY_MOST_S / 2 <= pauses[-1] <= retry.RETRY_MOST_S


def test_gives_up_when_told_to(pauses: list[float]) -> None:
    with pytest.raises((DatabaseUnavailableError, ObjectStoreUnavailableError)):
        retrying(failing(1000), give_up_after_s=10)
    assert 10 <= sum(pauses) <= 10 + retry.RETRY_MOST_S


def test_other_errors_are_not_tried_again(pauses: list[float]) -> None:
    def call() -> None:
        raise RowNotFoundError("run", "a")

    with pytest.raises(RowNotFoundError):
        retrying(call)
    assert pauses == []

"""The clock that is handed in."""

from datetime import UTC, datetime, timedelta

from storage.clock import FrozenClock, SystemClock


def test_a_frozen_clock_moves_only_when_told_to() -> None:
    # Given
    clock = FrozenClock()
    before = clock.now()
    assert clock.now() == before
    # When
    clock.advance(1.5)
    # Then
    assert clock.now() - before == timedelta(seconds=1.5)
    assert before.tzinfo is UTC


def test_the_system_clock_is_aware() -> None:
    assert SystemClock().now().tzinfo is UTC
    assert SystemClock().now() - datetime.now(UTC) < timedelta(seconds=60)

"""The tail is what lies behind the newest snapshot, and its percentile forgets what is long past."""

import random

import numpy as np

from worker.replay_tail import RECENT, RecentPercentile, ReplayTail


def test_the_tail_is_what_came_after_the_newest_snapshot() -> None:
    # Given
    tail = ReplayTail()
    for seq, device_ns in ((3, 10), (4, 20), (7, 40)):
        tail.add(seq, device_ns)
    assert tail.device_ns == 70
    # When a snapshot holds the state in between, and one of before comes late
    tail.shorten(5)
    tail.shorten(2)
    # Then
    assert tail.device_ns == 40
    tail.shorten(7)
    assert tail.device_ns == 0


def test_the_percentile_is_that_of_the_latest_values() -> None:
    # Given
    percentile, numbers = RecentPercentile(), random.Random(1)
    assert percentile.p95 == 0
    values = [numbers.randrange(10**9) for _ in range(2 * RECENT + 77)]
    # When
    for place, value in enumerate(values, start=1):
        percentile.add(value)
        if place in (1, 7, 100, RECENT, len(values)):
            # Then
            latest = values[max(0, place - RECENT) : place]
            assert percentile.p95 == np.percentile(latest, 95, method="inverted_cdf")

"""Device time of a step, split among the operations in it so that the shares add up to the last nanosecond."""

from __future__ import annotations

from collections.abc import Sequence


def split_ns(device_ns: int, work: Sequence[int]) -> list[int]:
    """Split a step's device time in proportion to work, by largest remainder (Hamilton's method).

    Args:
        device_ns: of the whole step, in nanoseconds.
        work: units per operation, not negative; all zero counts as all equal.

    Returns:
        Nanoseconds per operation, in order; their sum is `device_ns`. Of equal remainders the earlier is served first.

    Raises:
        ValueError: negative time or work, or time without an operation to bear it.
    """
    if device_ns < 0 or any(units < 0 for units in work):
        raise ValueError(f"time and work cannot be negative: {device_ns} ns over {list(work)}")
    if not work:
        if device_ns:
            raise ValueError(f"{device_ns} ns of device time and no operation to bear them")
        return []
    weights = list(work) if any(work) else [1] * len(work)
    total = sum(weights)
    shares = [device_ns * units // total for units in weights]
    remainders = [device_ns * units % total for units in weights]
    left = device_ns - sum(shares)
    for index in sorted(range(len(weights)), key=lambda place: (-remainders[place], place))[:left]:
        shares[index] += 1
    return shares

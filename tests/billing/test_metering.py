"""Shares of device time add up to the last nanosecond, whatever the work."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.metering import split_ns

times = st.integers(0, 10**18)
works = st.lists(st.integers(0, 10**24), min_size=1, max_size=60)


@given(times, works)
def test_shares_are_whole_and_add_up_exactly(device_ns: int, work: list[int]) -> None:
    # When
    shares = split_ns(device_ns, work)
    # Then
    assert sum(shares) == device_ns
    assert len(shares) == len(work)
    assert all(share >= 0 for share in shares)


@given(times, works)
def test_more_work_never_bears_less_time(device_ns: int, work: list[int]) -> None:
    # When
    shares = split_ns(device_ns, work)
    # Then
    by_work = [share for _, share in sorted(zip(work, shares, strict=True))]
    assert by_work == sorted(by_work)


@given(times, works)
def test_a_share_is_off_its_exact_proportion_by_less_than_a_nanosecond(device_ns: int, work: list[int]) -> None:
    # When
    shares = split_ns(device_ns, work)
    # Then
    total = sum(work)
    if total:
        assert all(abs(share * total - device_ns * units) < total for share, units in zip(shares, work, strict=True))


def test_of_equal_remainders_the_earlier_is_served_first() -> None:
    assert split_ns(5, [1, 1, 1]) == [2, 2, 1]


def test_no_work_at_all_counts_as_equal_work() -> None:
    assert split_ns(4, [0, 0]) == [2, 2]


def test_what_did_nothing_beside_others_bears_nothing() -> None:
    assert split_ns(10, [0, 3]) == [0, 10]


def test_nothing_is_split_among_nobody() -> None:
    assert split_ns(0, []) == []


@pytest.mark.parametrize(("device_ns", "work"), [(-1, [1]), (1, [1, -1]), (1, [])])
def test_impossible_time_or_work_is_refused(device_ns: int, work: list[int]) -> None:
    with pytest.raises(ValueError, match=r"negative|no operation"):
        split_ns(device_ns, work)

"""Whoever has had the least device time comes first; idling neither saves up turns nor sheds what was consumed."""

from collections import Counter

from worker.fairness import Activity, Claimant, FairShare

A: Claimant = ("a", Activity.TRAINING)
B: Claimant = ("b", Activity.TRAINING)
C: Claimant = ("c", Activity.SAMPLING)
A_SAMPLING: Claimant = ("a", Activity.SAMPLING)


def _serve(fair: FairShare, turns: list[set[Claimant]], cost_ns: dict[Claimant, int]) -> Counter[Claimant]:
    """Give each turn to the first in order; returns the device time of each."""
    consumed: Counter[Claimant] = Counter()
    for waiting in turns:
        first = fair.order(waiting)[0]
        fair.charge(first, cost_ns[first])
        consumed[first] += cost_ns[first]
    return consumed


def test_the_one_who_has_had_least_comes_first() -> None:
    # Given
    fair = FairShare()
    fair.order([A, B])
    fair.charge(A, 10)
    # Then
    assert fair.order([A, B]) == [B, A]


def test_device_time_is_shared_evenly_however_long_each_turn_is() -> None:
    # When
    consumed = _serve(FairShare(), [{A, B}] * 500, {A: 100, B: 7})
    # Then
    assert abs(consumed[A] - consumed[B]) <= 100


def test_training_and_sampling_of_one_account_share_evenly_too() -> None:
    # When
    consumed = _serve(FairShare(), [{A, A_SAMPLING}] * 300, {A: 50, A_SAMPLING: 5})
    # Then
    assert abs(consumed[A] - consumed[A_SAMPLING]) <= 50


def test_a_newcomer_starts_level_and_does_not_make_up_for_the_past() -> None:
    # Given
    fair = FairShare()
    _serve(fair, [{A}] * 100, {A: 10})
    # When
    consumed = _serve(fair, [{A, B}] * 100, {A: 10, B: 10})
    # Then
    assert abs(consumed[A] - consumed[B]) <= 20


def test_who_was_idle_for_long_has_saved_nothing_up() -> None:
    # Given
    fair = FairShare()
    _serve(fair, [{A, B}] * 2, {A: 10, B: 10})
    _serve(fair, [{A}] * 1_000, {A: 10})
    # When
    consumed = _serve(fair, [{A, B}] * 100, {A: 10, B: 10})
    # Then
    assert abs(consumed[A] - consumed[B]) <= 20


def test_one_that_pauses_between_operations_does_not_shed_what_it_consumed() -> None:
    """A client that waits for each outcome before it sends the next is absent every other turn."""
    # When
    consumed = _serve(FairShare(), [{A, B}, {B}] * 2_000, {A: 100, B: 10})
    # Then
    assert consumed[A] <= consumed[B] + 200


def test_what_is_remembered_is_bounded_by_who_is_ahead() -> None:
    # Given
    fair = FairShare()
    for number in range(1_000):
        claimant = (f"account-{number}", Activity.TRAINING)
        _serve(fair, [{claimant, B}] * 2, {claimant: 1, B: 1})
    # Then
    assert len(fair._consumed) < 10


def test_ties_have_one_order() -> None:
    assert FairShare().order({C, B, A, A_SAMPLING}) == sorted([A, A_SAMPLING, B, C])
    assert FairShare().order([]) == []

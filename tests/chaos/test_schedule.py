"""A seed is a schedule."""

from __future__ import annotations

from itertools import islice

import pytest

from storage.failpoints import Point
from tests.chaos.schedule import AT_POINT, COMMON, OWN, Act, SetUp, all_kinds, faults

SETUPS = ("embedded", "deployed")


@pytest.mark.parametrize("setup", SETUPS)
def test_the_same_seed_gives_the_same_faults_and_another_one_others(setup: SetUp) -> None:
    # given three schedules
    first, again, other = (list(islice(faults(setup, seed, lease_s=2.0), 50)) for seed in (1, 1, 2))

    # then
    assert first == again
    assert first != other


@pytest.mark.parametrize("setup", SETUPS)
def test_every_point_has_its_turn_with_every_act_before_one_comes_again(setup: SetUp) -> None:
    # given as many faults as there are points and acts, and as many at random moments between them
    drawn = list(islice(faults(setup, 3, lease_s=2.0), 2 * len(Point) * len(AT_POINT)))

    # when those at points are taken
    at_points = [(fault.target, fault.act) for fault in drawn if fault.act in AT_POINT]

    # then none is missing and none came twice, and the others are what may happen on this set-up
    assert {target for target, _ in at_points[: len(Point)]} == set(Point)
    assert sorted(at_points) == sorted((point, act) for point in Point for act in AT_POINT)
    others = {(fault.act, fault.target) for fault in drawn if fault.act not in AT_POINT}
    assert others <= {(act, target) for act, target, _ in [*COMMON, *OWN[setup]]}


def test_half_of_what_is_stopped_is_stopped_for_longer_than_a_lease_lasts() -> None:
    # given many faults
    lasting = [fault.lasts_s for fault in islice(faults("deployed", 4, lease_s=2.0), 600) if fault.lasts_s]

    # then
    longer = sum(lasts_s > 2.0 for lasts_s in lasting) / len(lasting)
    assert 0.4 < longer < 0.6


@pytest.mark.parametrize("setup", SETUPS)
def test_faults_can_be_chosen_by_their_kind(setup: SetUp) -> None:
    # given all faults, and those that somebody wants
    drawn = list(islice(faults(setup, 5, lease_s=2.0), 400))
    wanted = list(islice(faults(setup, 5, lease_s=2.0, only=("kill: api", "committed")), 10))

    # then the order is the same, and no others come
    chosen = [fault for fault in drawn if (fault.act, fault.target) == (Act.KILL, "api") or "committed" in fault.target]
    assert wanted == chosen[:10]
    assert {fault.kind for fault in drawn} <= set(all_kinds(setup))

"""Twenty faults on real processes, and then every check."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import campaign
from tests.chaos.campaign import Plan
from tests.chaos.schedule import SetUp

KILLS = 10


@pytest.mark.processes
@pytest.mark.servers
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("setup", ["embedded", "deployed"])
def test_nothing_is_lost_whatever_is_killed(setup: SetUp, tmp_path: Path) -> None:
    # given clients that train and sample, and ten faults
    plan = Plan(setup, seed=40, kills=KILLS)

    # when the faults have happened
    outcome = campaign.run(plan, tmp_path, on_fault=print)

    # then everything that was promised holds
    assert outcome.num_kills == KILLS, outcome.stopped_by
    assert not outcome.stopped_by
    assert {sentence: found for sentence, found in outcome.violations.items() if found} == {}

"""The takeover protocol holds in every state of its model, and the model notices when a guard is missing."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest

from tests.model import takeover
from tests.model.explorer import BrokenPropertyError, Explorer
from tests.model.takeover import Rules

TWICE = "an operation took effect twice"
WRONG = "an operation took effect on a state that was not the run's"
DANGLING = "a named snapshot has no object"
NO_TAIL = "what a replay needs is gone"
STRAY = "an object lies that no row knows"
STUCK = "from here nothing leads to the end"


def explore(rules: Rules) -> int:
    """The number of states."""
    explorer = Explorer(
        takeover.begin(rules),
        partial(takeover.moves, rules),
        partial(takeover.fault, rules),
        partial(takeover.is_done, rules),
    )
    return explorer.explore()


@pytest.mark.parametrize(
    ("rules", "states_min"),
    [
        (Rules(zombies_upload=False), 20_000),
        (Rules(operations=1), 10_000),
        (Rules(workers=1, operations=3), 15_000),
        (Rules(workers=3, operations=1, zombies_upload=False), 10_000),
        (Rules(workers=3, operations=3, writes_snapshots=False), 5_000),
    ],
    ids=["two workers", "zombies that upload", "three operations", "three workers", "replay from the beginning"],
)
def test_the_protocol_holds_in_every_state(
    rules: Rules, states_min: int, record_property: Callable[[str, object], None]
) -> None:
    # When
    num_states = explore(rules)
    # Then
    record_property("states", num_states)
    assert num_states > states_min, "a model that explores little proves little"


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (Rules(acquiring_raises_the_epoch=False), TWICE),
        (Rules(commits_check_the_epoch=False), TWICE),
        (Rules(unknown_commits_are_read_back=False), TWICE),
        (Rules(uploads_are_announced=False), STRAY),
        (Rules(naming_checks_the_upload=False), DANGLING),
        (Rules(rows_are_doomed_before_objects=False), DANGLING),
        (Rules(writers_remove_what_came_too_late=False), STRAY),
        (Rules(snapshots_have_checksums=False), WRONG),
        (Rules(tails_are_replayed=False), WRONG),
        (Rules(payloads_covered_by=1), NO_TAIL),
        (Rules(snapshots_kept=1, payloads_covered_by=1), NO_TAIL),
        (Rules(workers=1, stalled_work_is_announced=False), STUCK),
    ],
    ids=lambda value: (
        ", ".join(k for k, v in value._asdict().items() if v != Rules._field_defaults[k])
        if isinstance(value, Rules)
        else ""
    ),
)
def test_the_model_notices_a_missing_guard_and_says_how(rules: Rules, reason: str) -> None:
    # When
    with pytest.raises(BrokenPropertyError) as raised:
        explore(rules)
    # Then
    assert raised.value.reason == reason
    print(raised.value)


def test_a_trace_is_as_short_as_can_be_and_each_step_leads_to_the_next() -> None:
    # Given
    rules = Rules(unknown_commits_are_read_back=False)
    # When
    with pytest.raises(BrokenPropertyError) as raised:
        explore(rules)
    # Then
    trace = raised.value.trace
    assert [step.name for step in trace] == [
        "begin",
        "accept and announce",
        "acquire",
        "load snapshot -1",
        "compute 0 to 0",
        "commit 0 to 0; the answer is lost",
        "commit 0 to 0",
    ]
    for before, after in itertools.pairwise(trace):
        assert (after.name, after.state) in takeover.moves(rules, before.state)  # type: ignore[arg-type]

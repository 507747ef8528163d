"""What a worker knows of spent caps: what its commits tell at once, the rest as it was last read."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime

from billing.budgets import Budget, Scope
from billing.dimensions import Dimensions
from worker.spent_caps import SpentCaps

MINE = Dimensions("acme", run_id="r")


def make_budget(id_: int, account_id: str = "acme", scope: Scope = Scope.ACCOUNT, scope_id: str = "acme") -> Budget:
    """A hard cap that is spent."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    return Budget(id_, account_id, scope, scope_id, "none", 1, True, [], start, 1, 0, 0)


def test_what_is_read_replaces_what_was_known() -> None:
    # Given
    caps = SpentCaps()
    caps.add([make_budget(1)])
    assert caps.pause(MINE)
    # When
    caps.replace([], since=caps.mark)
    # Then
    assert not caps.pause(MINE)


def test_what_a_commit_tells_while_others_are_read_is_not_forgotten() -> None:
    # Given
    caps = SpentCaps()
    mark = caps.mark
    # When
    caps.add([make_budget(1)])
    caps.replace([make_budget(2, "other", scope_id="other")], since=mark)
    # Then
    assert caps.pause(MINE)
    assert caps.pause(Dimensions("other"))


def test_a_cap_pauses_its_scope_alone() -> None:
    # Given
    caps = SpentCaps()
    # When
    caps.add([make_budget(1, scope=Scope.RUN, scope_id="r")])
    # Then
    assert caps.pause(MINE)
    assert not caps.pause(Dimensions("acme", run_id="another"))
    assert not caps.pause(Dimensions("other", run_id="r"))


def test_the_version_changes_with_what_is_paused_and_not_else() -> None:
    # Given
    caps = SpentCaps()
    versions = [caps.version]
    # When
    for spent in ([make_budget(1)], [make_budget(1)], [make_budget(1), make_budget(2)], []):
        caps.replace(spent, since=caps.mark)
        versions.append(caps.version)
    # Then
    changed = [after != before for before, after in itertools.pairwise(versions)]
    assert changed == [True, False, True, True]

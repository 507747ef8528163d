"""The list of guards fits the sources: what it replaces stands there once, and the tests it names exist."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutations import page
from tests.mutations.guard import Change, Guard
from tests.mutations.guards import GUARDS
from tests.mutations.trial import ROOT, Copy, GuardNotFoundError


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_what_takes_a_guard_away_stands_in_the_sources_once(guard: Guard) -> None:
    assert [fault for change in guard.changes if (fault := change.fault(ROOT))] == []
    assert all(change.old != change.new for change in guard.changes)


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_each_guard_names_tests_that_exist(guard: Guard) -> None:
    assert guard.red
    for test in guard.red:
        path, *names = test.split("::")
        assert names[-1] in _names_in(ROOT / path), f"{path} has no {names[-1]}"


def _names_in(path: Path) -> set[str]:
    """Tests of a module, those of state machines too, which are assigned."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return defined | {name.id for name in ast.walk(tree) if isinstance(name, ast.Name)}


def test_guards_have_names_of_their_own() -> None:
    assert len({guard.name for guard in GUARDS}) == len(GUARDS)


def test_the_page_of_mutations_is_that_of_the_list() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), "run: python -m tests.mutations.page"


def test_text_that_is_not_there_ends_the_trial_and_leaves_the_copy_as_it_was(tmp_path: Path) -> None:
    # Given
    path = "tests/mutations/guard.py"
    first = Change(path, '"""A guard, and how', '"""How')
    gone = Change(path, "there is no such " + "text", "")
    copy = Copy(tmp_path)
    # When
    with pytest.raises(GuardNotFoundError, match="0 times"):
        copy.without(Guard("nothing", "nothing", (first, gone), ("tests/mutations/test_guards.py::x",)))
    # Then
    assert (tmp_path / "copy" / path).read_text() == (ROOT / path).read_text()

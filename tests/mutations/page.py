"""`python -m tests.mutations.page` writes docs/mutations.md from the list of guards; a test compares the two."""

from __future__ import annotations

from tests.mutations.guard import Guard
from tests.mutations.guards import GUARDS
from tests.mutations.trial import ROOT

PAGE = ROOT / "docs" / "mutations.md"
HEAD = """# What each promise rests on, and the test that goes red without it

`make test-mutations` takes these guards away, one at a time, in a copy of the repository, and runs the tests named
beside it: each must fail by an assertion. With every guard in place all of them pass.

| without | what would happen | taken away in | goes red |
| --- | --- | --- | --- |
"""


def render() -> str:
    """The page."""
    return HEAD + "".join(_row(guard) for guard in GUARDS)


def _row(guard: Guard) -> str:
    places = ", ".join(f"`{path}`" for path in dict.fromkeys(change.path for change in guard.changes))
    tests = "<br>".join(f"`{test}`" for test in guard.red)
    return f"| {guard.name} | {guard.keeps} | {places} | {tests} |\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")

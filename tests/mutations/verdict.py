"""A pytest plugin that writes what became of each test, and whether one that failed did so by an assertion.

A test that breaks in another way has not seen that the guard is gone: it may fail for any reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

import storage

VARIABLE = "PIECEWORK_TESTS_VERDICT"
_verdicts: dict[str, str] = {}


def pytest_configure(config: pytest.Config) -> None:
    """Make sure that the copy is tested, and not what is installed."""
    if not Path(str(storage.__file__)).is_relative_to(Path.cwd()):
        raise pytest.UsageError(f"{storage.__file__} would be tested, which is not in {Path.cwd()}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note `passed`, `asserted` or `broken`; of several parameters and phases the worst but for `asserted`."""
    report = yield
    name = item.nodeid.partition("[")[0]
    if call.excinfo is not None and not report.skipped:
        error: Any = call.excinfo.value
        verdict = "asserted" if call.when == "call" and _is_assertion(error) else "broken"
        if _verdicts.get(name) != "asserted":
            _verdicts[name] = verdict
    elif call.when == "call":
        _verdicts.setdefault(name, str(report.outcome))
    return report


def pytest_sessionfinish() -> None:
    """Write the verdicts."""
    Path(os.environ[VARIABLE]).write_text(json.dumps(_verdicts))


def _is_assertion(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_assertion(one) for one in error.exceptions)
    did_not_raise = isinstance(error, pytest.fail.Exception) and "DID NOT RAISE" in str(error)
    return isinstance(error, AssertionError) or did_not_raise

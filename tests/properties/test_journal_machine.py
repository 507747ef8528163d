"""Whatever clients, workers and sweepers do, in whatever order: fenced, in order, once, billed once, nothing lost."""

import logging
import os
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from storage import retry
from tests.properties.bill_machine import BillMachine
from tests.properties.conftest import Fresh
from tests.properties.machine import JournalMachine

EXAMPLES = int(os.environ.get("PIECEWORK_TESTS_EXAMPLES", "0"))
"""Histories to try, other ones each time; 0 tries a few, always the same."""
FEW = {"sqlite": 30, "postgres": 10}
STEPS = 40


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trying again does not wait, and nobody reads the log."""
    monkeypatch.setattr(retry, "RETRY_FIRST_S", 0.0)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.mark.timeout(3600)
def test_no_history_loses_doubles_or_mixes_anything(fresh_storage: Fresh, kind: str) -> None:
    _run(JournalMachine, fresh_storage, kind)


@pytest.mark.timeout(3600)
def test_no_history_moves_the_bill_by_a_unit_of_the_last_digit(fresh_storage: Fresh, kind: str) -> None:
    _run(BillMachine, fresh_storage, kind)


def _run(machine: type[JournalMachine], fresh_storage: Fresh, kind: str) -> None:
    run_state_machine_as_test(
        lambda: machine(fresh_storage()),
        settings=settings(
            max_examples=EXAMPLES or FEW[kind],
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            derandomize=not EXAMPLES,
            report_multiple_bugs=False,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )

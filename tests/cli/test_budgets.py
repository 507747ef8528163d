"""Budgets on the command line, without a running service."""

from __future__ import annotations

from pathlib import Path

import pytest

from billing.budgets import Period, Scope
from tests.cli.test_admin import run, run_json


@pytest.mark.parametrize("period", Period)
def test_a_cap_is_added_for_a_period_as_the_documentation_writes_it(tmp_path: Path, period: Period) -> None:
    # Given
    run_json(tmp_path, "accounts", "create", "ada")
    # When
    added = ("budgets", "add", "25", "--account", "ada", "--scope", "project", "--id", "p", "--period", period.value)
    run_json(tmp_path, *added)
    # Then
    (budget,) = run_json(tmp_path, "budgets", "list", "--account", "ada")["budgets"]
    assert (budget["scope"], budget["scope_id"], budget["period"], budget["cap"]) == ("project", "p", period, "25")


@pytest.mark.parametrize("scope", Scope)
def test_every_scope_is_understood(tmp_path: Path, scope: Scope) -> None:
    run_json(tmp_path, "accounts", "create", "ada")
    told = run(tmp_path, "budgets", "add", "25", "--account", "ada", "--scope", scope.value)
    assert told.exit_code == 0 or f"--scope {scope} needs --id" in told.output

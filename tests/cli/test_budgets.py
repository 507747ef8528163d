"""Budgets on the command line, without a running service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from billing.budgets import Period, Scope
from storage import accounts
from storage.open import open_storage
from storage.settings import StorageSettings
from tests.cli.test_admin import run, run_json
from tests.factories import make_run


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


def test_a_cap_tells_where_it_is_said_to(tmp_path: Path) -> None:
    # given
    run_json(tmp_path, "accounts", "create", "ada")
    # when
    run_json(tmp_path, "budgets", "add", "1", "--account", "ada")
    run_json(tmp_path, "budgets", "add", "2", "--account", "ada", "--tell-at", "120", "--tell-at", "90", "--soft")
    # then
    listed = run_json(tmp_path, "budgets", "list", "--account", "ada")["budgets"]
    assert [(budget["cap"], budget["thresholds"]) for budget in listed] == [("1", [50, 80, 100]), ("2", [90, 120])]
    refused = run(tmp_path, "budgets", "add", "3", "--account", "ada", "--tell-at", "0")
    assert refused.exit_code == 2
    assert "--tell-at" in refused.output


@pytest.mark.parametrize("scope", Scope)
def test_every_scope_is_understood(tmp_path: Path, scope: Scope) -> None:
    run_json(tmp_path, "accounts", "create", "ada")
    told = run(tmp_path, "budgets", "add", "25", "--account", "ada", "--scope", scope.value)
    assert told.exit_code == 0 or f"--scope {scope} needs --id" in told.output


def test_an_id_without_a_scope_caps_nothing(tmp_path: Path) -> None:
    # given
    run_json(tmp_path, "accounts", "create", "ada")
    # when
    refused = run(tmp_path, "budgets", "add", "3", "--account", "ada", "--id", "zzz")
    # then
    says = "Error: --id needs --scope, to say what 'zzz' is: project, key, session, run, batch\n"
    assert (refused.exit_code, refused.output) == (1, says)
    assert run_json(tmp_path, "budgets", "list")["budgets"] == []


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data directory with two accounts."""
    for name in ("ada", "eve"):
        run_json(tmp_path, "accounts", "create", name)
    return tmp_path


def caps(data_dir: Path, account: str = "ada") -> dict[int, str]:
    """An account's caps by the numbers of its budgets."""
    found = run_json(data_dir, "budgets", "list", "--account", account)["budgets"]
    return {budget["id"]: budget["cap"] for budget in found}


def add(data_dir: Path, cap: str, *arguments: str) -> Any:
    """A budget of ada's."""
    (budget,) = run_json(data_dir, "budgets", "add", cap, "--account", "ada", *arguments)["budgets"]
    return budget


def test_budgets_are_listed_with_what_is_spent_and_held(data_dir: Path) -> None:
    # given
    assert "no budget yet" in run(data_dir, "budgets", "list", "--account", "ada").output
    hard, soft = add(data_dir, "25"), add(data_dir, "3.5", "--period", "month", "--soft")
    run_json(data_dir, "billing", "topup", "5", "--account", "ada")
    # when
    listed = run_json(data_dir, "budgets", "list", "--account", "ada")["budgets"]
    table = [line.split() for line in run(data_dir, "budgets", "list", "--account", "ada").output.splitlines()]
    # then
    assert [(one["id"], one["cap"], one["spent"], one["held"]) for one in listed] == [
        (hard["id"], "25", "-5", "0"),
        (soft["id"], "3.5", "-5", "0"),
    ]
    everybodys = run_json(data_dir, "budgets", "list")["budgets"]
    assert table[1:] == [
        [str(hard["id"]), "ada", "account", "hard", "25", "-5", "0", "open"],
        [str(soft["id"]), "ada", "account", "month", "soft", "3.5", "-5", "0", "open"],
    ]
    assert everybodys == listed
    assert caps(data_dir, "eve") == {}


def test_a_cap_is_changed_and_removed(data_dir: Path) -> None:
    # given
    first, second = add(data_dir, "25")["id"], add(data_dir, "50")["id"]
    # when
    (changed,) = run_json(data_dir, "budgets", "set", str(first), "30", "--account", "ada")["budgets"]
    shown = run(data_dir, "budgets", "set", str(second), "60", "--account", "ada").output
    # then
    assert (changed["id"], changed["cap"]) == (first, "30")
    assert "60" in shown.splitlines()[-1].split()
    assert caps(data_dir) == {first: "30", second: "60"}
    # when
    assert run_json(data_dir, "budgets", "remove", str(first), "--account", "ada") == {"removed": first}
    assert run(data_dir, "budgets", "remove", str(second), "--account", "ada").output == f"budget {second} is removed\n"
    # then
    assert caps(data_dir) == {}


@pytest.mark.parametrize("command", ["set", "remove"])
def test_a_budget_that_is_unknown_or_anothers_stays_as_it_is(data_dir: Path, command: str) -> None:
    # given a budget of ada's
    budget = add(data_dir, "25")["id"]
    cap = ["30"] if command == "set" else []
    for account, number in (("eve", budget), ("ada", budget + 1)):
        # when
        refused = run(data_dir, "budgets", command, str(number), *cap, "--account", account)
        # then
        says = f"Error: there is no budget {number}: see `piecework budgets list --account {account}`\n"
        assert (refused.exit_code, refused.output) == (1, says)
    assert caps(data_dir) == {budget: "25"}


def test_what_is_another_accounts_is_not_capped(data_dir: Path) -> None:
    # given a key, a session and a run of eve's
    run_json(data_dir, "keys", "create", "--account", "eve")
    (key,) = [key for key in run_json(data_dir, "keys", "list")["keys"] if key["account"] == "eve"]
    storage = open_storage(StorageSettings(data_dir=data_dir))
    with storage.database.begin() as tx:
        trained = make_run(tx, accounts.get_account(tx, "eve"))
    storage.close()
    for scope, id_ in (("key", str(key["id"])), ("session", trained.session_id), ("run", trained.id)):
        capping = ("budgets", "add", "25", "--scope", scope, "--id", id_, "--account")
        # when
        refused = run(data_dir, *capping, "ada")
        # then
        assert (refused.exit_code, f"--id {id_}: the account has no such {scope}" in refused.output) == (1, True)
        assert run(data_dir, *capping, "eve").exit_code == 0
    assert (caps(data_dir), len(caps(data_dir, "eve"))) == ({}, 3)

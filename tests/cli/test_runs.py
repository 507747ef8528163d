"""`piecework runs` and `ops` show what was left behind, in a terminal of 80 columns too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import update

from api.cli.commands import piecework
from billing import budgets, rate_cards
from billing.budgets import Scope
from storage import journal, runs, tables
from storage.journal import Refusal
from storage.migrate import migrate
from storage.open import Storage, open_storage
from storage.runs import Run
from storage.settings import StorageSettings
from tests.factories import bill, complete, make_operation, make_run, make_session, make_usage


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    opened = open_storage(StorageSettings(data_dir=tmp_path))
    migrate(opened.database)
    yield opened
    opened.close()


@pytest.fixture
def run(storage: Storage) -> Run:
    """Operation 0 is completed, 1 has failed, 2 and 3 wait."""
    with storage.database.begin() as tx:
        run = make_run(tx, base_model="Qwen/Qwen3-30B-A3B-Instruct-2507")
        complete(tx, make_operation(tx, run, 0, "create_model"))
        make_operation(tx, run, 1, "save_weights_for_sampler", refusal=Refusal("name: is taken; " + "x" * 200, "user"))
        for seq in (2, 3):
            make_operation(tx, run, seq)
        tx.execute(update(tables.run).where(tables.run.c.id == run.id).values(state_seq=1))
    return run


def command(tmp_path: Path, *arguments: str) -> Result:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(piecework, [*arguments, "--data-dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    return result


def command_json(tmp_path: Path, *arguments: str) -> Any:
    return json.loads(command(tmp_path, *arguments, "--json").output)


def test_operations_are_shown_with_their_outcome(tmp_path: Path, run: Run) -> None:
    rows = command_json(tmp_path, "ops", run.id)["operations"]
    assert [(row["seq"], row["status"]) for row in rows] == [
        (0, "completed"),
        (1, "failed"),
        (2, "queued"),
        (3, "queued"),
    ]
    lines = command(tmp_path, "ops", run.id).output.splitlines()
    table, errors = lines[:-1], lines[-1]
    assert len(table) >= 5
    assert max(map(len, table)) <= 80
    assert errors.startswith("seq 1: name: is taken")


def test_operations_are_read_page_by_page(tmp_path: Path, run: Run) -> None:
    first = command(tmp_path, "ops", run.id, "--limit", "3").output
    assert "more: --after 2" in first
    rest = command_json(tmp_path, "ops", run.id, "--after", "2")["operations"]
    assert [row["seq"] for row in rest] == [3]


def test_runs_are_shown_with_what_waits_and_their_ids_whole(tmp_path: Path, run: Run, storage: Storage) -> None:
    (row,) = command_json(tmp_path, "runs")["runs"]
    assert (row["run"], row["state_seq"], row["num_open"]) == (run.id, 1, 2)
    lines = command(tmp_path, "runs").output.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(run.id in line for line in lines)
    assert row["waits_for"] is None
    # and: page by page
    with storage.database.begin() as tx:
        make_run(tx, session=make_session(tx), now=journal.get_operation(tx, f"{run.id}:0").accepted_at)
    pages = [command_json(tmp_path, "runs", "--limit", "1", "--after", str(left_out))["runs"] for left_out in range(3)]
    assert [len(page) for page in pages] == [1, 1, 0]
    assert pages[0][0]["run"] != pages[1][0]["run"]


def test_what_waits_for_room_under_a_cap_is_told_wherever_one_looks(tmp_path: Path, run: Run, storage: Storage) -> None:
    # given a run whose next operation is not accepted
    card = '[million_tokens."*"]\ntrained = "1000000"\n'
    with storage.database.begin() as tx:
        now = storage.database.now(tx)
        rate_cards.add(tx, card, now=now - timedelta(days=1))
        budget = budgets.add(tx, run.account_id, Scope.RUN, run.id, cap=5, now=now)
        runs.note_refused(tx, run.id, 4, now=now)
        budgets.note_refused(tx, budget, 9, now=now)
    # then
    assert command_json(tmp_path, "runs")["runs"][0]["waits_for"] == "room under a cap"
    assert command_json(tmp_path, "budgets", "list")["budgets"][0]["state"] == "refusing"
    assert command_json(tmp_path, "status")["budgets_without_room"] == [budget.id]
    said = "caps that are spent or have no room for what is asked for: 1; piecework budgets list"
    assert said in command(tmp_path, "status").output
    # when what it may cost is spent
    with storage.database.begin() as tx:
        bill(tx, run, make_operation(tx, run, 5), make_usage(tokens_trained=1), now=now)
    # then
    lines = command(tmp_path, "runs").output.splitlines()
    assert f"budget {budget.id}" in lines[2]
    assert command_json(tmp_path, "runs")["runs"][0]["waits_for"] == f"budget {budget.id}"
    # when there is room
    command(tmp_path, "budgets", "set", str(budget.id), "25", "--account", "acme")
    with storage.database.begin() as tx:
        make_operation(tx, run, 4)
    # then
    assert command_json(tmp_path, "runs")["runs"][0]["waits_for"] is None
    assert command_json(tmp_path, "status")["budgets_without_room"] == []


def test_costs_are_shown_run_by_run_in_a_terminal_of_80_columns(tmp_path: Path, run: Run, storage: Storage) -> None:
    # given
    with storage.database.begin() as tx:
        now = storage.database.now(tx)
        rate_cards.add(tx, '[device_seconds]\n"*" = "0.000012345678"\n', now=now - timedelta(days=1))
        trained = make_usage(device_ns=1_234_567_890_123, tokens_trained=123_456_789)
        sampled = make_usage(
            device_ns=987_654_321_987, tokens_prefilled=1_234_567, tokens_cached=7_654_321, tokens_sampled=9_999_999
        )
        bill(tx, run, make_operation(tx, run, 4), trained, now=now)
        bill(tx, run, make_operation(tx, run, 5, "sample"), sampled, now=now)
    # when
    lines = command(tmp_path, "cost").output.splitlines()
    # then
    assert max(map(len, lines)) <= 80
    assert lines[1] == f"acme  {run.id}"
    report = command_json(tmp_path, "cost")
    for row in [*report["rows"], report["total"]]:
        assert any(line.endswith(f"  {row['cost']}") for line in lines), row
    words = " ".join(" ".join(lines).split())
    for told in ("trained 123,456,789", "prefilled 1,234,567,", "cached 7,654,321,", "sampled 9,999,999"):
        assert f" {told}" in words, told

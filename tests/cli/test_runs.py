"""`piecework runs` and `ops` show what was left behind, in a terminal of 80 columns too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import update

from api.cli.commands import piecework
from storage import journal, tables
from storage.journal import Refusal
from storage.migrate import migrate
from storage.open import Storage, open_storage
from storage.runs import Run
from storage.settings import StorageSettings
from tests.factories import complete, make_operation, make_run, make_session


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
    # and: page by page
    with storage.database.begin() as tx:
        make_run(tx, session=make_session(tx), now=journal.get_operation(tx, f"{run.id}:0").accepted_at)
    pages = [command_json(tmp_path, "runs", "--limit", "1", "--after", str(left_out))["runs"] for left_out in range(3)]
    assert [len(page) for page in pages] == [1, 1, 0]
    assert pages[0][0]["run"] != pages[1][0]["run"]

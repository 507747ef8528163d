"""Usage exported on the command line, without a running service."""

from __future__ import annotations

import csv
import json
from decimal import Decimal
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest
from pyarrow import parquet
from sqlalchemy import update

from billing import usage_lines
from storage import billing_tables
from storage.open import open_storage
from storage.settings import StorageSettings
from tests.cli.test_admin import run, run_json
from tests.cli.test_invoices import use


@pytest.fixture
def cost(tmp_path: Path) -> Decimal:
    """What the account `ada` has been charged."""
    use(tmp_path)
    return Decimal(run_json(tmp_path, "cost", "--account", "ada")["total"]["cost"])


def test_usage_is_written_to_a_file_in_each_format(tmp_path: Path, cost: Decimal) -> None:
    for file_format in ("csv", "parquet", "cloudevents"):
        # When
        path = tmp_path / f"usage.{file_format}"
        arguments = ("--from", "24h", "--format", file_format, "--account", "ada", "--output", str(path))
        done = run_json(tmp_path, "billing", "export", *arguments)
        # Then
        assert done == {"lines": 1, "file": str(path)}
    with (tmp_path / "usage.csv").open(newline="") as file:
        assert [Decimal(row["charge"]) for row in csv.DictReader(file)] == [cost]
    assert parquet.read_table(tmp_path / "usage.parquet")["charge"].to_pylist() == [cost]
    event = json.loads((tmp_path / "usage.cloudevents").read_text())
    assert Decimal(event["data"]["charge"]) == cost


def test_usage_is_put_into_the_object_store_and_it_is_said_where(tmp_path: Path, cost: Decimal) -> None:
    # When
    done = run(tmp_path, "billing", "export", "--from", "24h")
    # Then
    assert done.exit_code == 0, done.output
    at = done.stdout.strip()
    (row,) = csv.DictReader(Path(url2pathname(urlsplit(at).path)).read_text().splitlines())
    assert Decimal(row["charge"]) == cost
    # and programs are told its key
    done = run_json(tmp_path, "billing", "export", "--from", "24h")
    assert (done["at"].endswith(f"/objects/{done['key']}"), done["url"]) == (True, None)


@pytest.mark.usefixtures("cost")
def test_the_lines_that_were_written_are_told_though_more_were_committed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given: nothing was there when lines were counted
    monkeypatch.setattr(usage_lines, "count", lambda *_, **__: 0)
    # When
    done = run_json(tmp_path, "billing", "export", "--from", "24h", "--output", str(tmp_path / "usage.csv"))
    # Then
    assert done["lines"] == 1 == len((tmp_path / "usage.csv").read_text().splitlines()) - 1


def test_a_period_that_ends_before_it_begins_is_refused(tmp_path: Path) -> None:
    run_json(tmp_path, "accounts", "create", "ada")
    refused = run(tmp_path, "billing", "export", "--from", "2026-02-01", "--to", "2026-01-01")
    assert refused.exit_code == 1
    assert "must be before --to" in refused.output


def test_rollups_are_made_anew(tmp_path: Path, cost: Decimal) -> None:
    # Given: sums that something else has spoilt
    run_json(tmp_path, "billing", "rebuild-rollups")
    storage = open_storage(StorageSettings(data_dir=tmp_path))
    with storage.database.begin() as tx:
        tx.execute(update(billing_tables.usage_rollup).values(charge=0))
    storage.close()
    assert Decimal(run_json(tmp_path, "cost", "--account", "ada")["total"]["cost"]) == 0
    # When
    assert run_json(tmp_path, "billing", "rebuild-rollups") == {"rebuilt": True}
    # Then
    assert Decimal(run_json(tmp_path, "cost", "--account", "ada")["total"]["cost"]) == cost

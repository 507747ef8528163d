"""`tinker billing` of two versions of the SDK against a server: table, JSON, CSV, adding up to what was charged."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import tinker

from billing import ledger, money, rate_cards, storage_metering
from billing.usage_totals import hour_of
from storage import billing_tables
from storage.accounts import get_account
from storage.clock import FrozenClock
from tests.factories import make_checkpoint, make_run, make_session
from tests.setups.deployment import Deployment
from tests.wire.conftest import Wire
from tests.wire.test_older_clients import TEXT, training_input

pytestmark = pytest.mark.processes

HOUR = timedelta(hours=1)


OLDER = "0.33.1"
"""The first one whose usage tells costs."""
VERSIONS = (tinker.__version__, OLDER)
OLDER_SDK = Path(__file__).parents[2] / f".venv-sdk-{OLDER}"


@dataclass(frozen=True)
class Cli:
    """The command of a version of the SDK.

    Attributes:
        directory: which it is imported from; empty for the installed one.
    """

    version: str
    directory: str = ""

    def __call__(self, service: Deployment, *arguments: str, key: str = "") -> str:
        """What it prints."""
        environment = {
            "TINKER_BASE_URL": service.url,
            "TINKER_API_KEY": key or service.api_key,
            "COLUMNS": "400",
            "PYTHONPATH": self.directory,
        }
        command = [sys.executable, "-m", "tinker.cli", *arguments]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


def cli_of(version: str) -> Cli:
    """The installed SDK's command, or an older one's: it needs the same packages and is installed beside it."""
    if version != OLDER:
        return Cli(version)
    if not (OLDER_SDK / f"tinker-{OLDER}.dist-info").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(OLDER_SDK), f"tinker=={OLDER}"], check=True)
    return Cli(OLDER, str(OLDER_SDK))


@pytest.fixture(params=VERSIONS)
def tinker_cli(request: pytest.FixtureRequest) -> Cli:
    """The command of each version."""
    return cli_of(request.param)


def test_the_older_sdk_is_the_one_that_runs(tinker_cli: Cli, service: Deployment) -> None:
    assert tinker_cli.version in tinker_cli(service, "version")


def test_tinker_billing_agrees_with_what_was_charged(wire: Wire, service: Deployment, tinker_cli: Cli) -> None:
    # Given: a run that has trained, saved and been sampled from
    run = wire.run()
    wire.result(
        wire.submit("forward_backward", {"forward_backward_input": training_input(), "model_id": run, "seq_id": 1})
    )
    stepped = wire.result(wire.step(run, 2))
    path = wire.result(wire.submit("save_weights_for_sampler", {"model_id": run, "path": "kept", "seq_id": 3}))["path"]
    opened = {"session_id": wire.session, "sampling_session_seq_id": 0, "model_path": path}
    sampler = wire.post("create_sampling_session", opened).json()["sampling_session_id"]
    prompt = {"chunks": [{"tokens": TEXT}]}
    asked = {"num_samples": 1, "prompt": prompt, "sampling_params": {"max_tokens": 3}, "sampling_session_id": sampler}
    wire.result(wire.submit("asample", {**asked, "seq_id": 0}))
    # When
    start = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - HOUR
    window = [moment.isoformat() for moment in (start, start + 3 * HOUR)]
    told = json.loads(tinker_cli(service, "--format", "json", "billing", "usage", *window))
    table = tinker_cli(service, "billing", "usage", *window)
    rows = list(csv.DictReader(io.StringIO(tinker_cli(service, "billing", "usage", *window, "--csv", "-"))))
    kept = json.loads(tinker_cli(service, "--format", "json", "billing", "checkpoint-storage"))
    # Then: the session's rows add up to its cost
    mine = [event for event in told["data"] if event["session_id"] == wire.session]
    assert {event["event_info"]["type"] for event in mine} >= {"training", "sampling_prefill", "sampling_sample"}
    cost = wire.http.get("/api/v1/cost", params={"session": wire.session}).json()["total"]["cost"]
    assert sum(Decimal(str(event["estimated_cost_usd"] or 0)) for event in mine) == Decimal(cost) > 0
    assert sum(Decimal(row["estimated_cost_usd"] or 0) for row in rows if row["session_id"] == wire.session) == Decimal(
        cost
    )
    assert "sampling_sample" in table
    # And: to the ledger's entries
    with service.storage() as storage, storage.database.read() as tx:
        units = ledger.total_units(tx, billing_tables.ledger_entry.c.session_id == wire.session)
    assert money.from_units(units) == Decimal(cost)
    # And: what a run has cost was told with its step, and grows
    assert 0 < stepped["metrics"]["cost_usd"] < float(cost)
    # And
    (item,) = kept["data"]
    stored = wire.http.get(f"/api/v1/training_runs/{run}/checkpoints").json()["checkpoints"]
    assert item["checkpoint_count"] >= len(stored) > 0
    assert item["size_bytes"] >= sum(checkpoint["size_bytes"] for checkpoint in stored)
    assert tinker_cli(service, "billing", "checkpoint-storage")


def test_tinker_billing_shows_storage_as_it_was_metered(service: Deployment) -> None:
    # Given: an account that keeps a checkpoint, at a price of its own, and two hours in which nothing else happens
    name = f"keeper-{os.getpid()}"
    key = service.create_account(name)
    with service.storage() as storage:
        now = storage.database.clock.now()
        hour = hour_of(now)
        with storage.database.begin() as tx:
            account = get_account(tx, name)
            rate_cards.add(tx, '[gigabyte_months]\ncheckpoint = "720000"', now=now, account_id=account.id, lead_s=0)
            run = make_run(tx, session=make_session(tx, account, now=now), now=now)
            make_checkpoint(tx, run, now=now)
        storage.database.clock = FrozenClock(hour + 2 * HOUR + storage_metering.GRACE)
        while not storage_metering.meter(storage.database, pass_s=60):
            pass
    # When
    window = [moment.isoformat() for moment in (hour, hour + 2 * HOUR)]
    told = [
        (
            json.loads(cli(service, "--format", "json", "billing", "usage", *window, key=key))["data"],
            json.loads(cli(service, "--format", "json", "billing", "checkpoint-storage", key=key))["data"],
        )
        for cli in map(cli_of, VERSIONS)
    ]
    cost = service.command_json("cost", "--account", name, "--since", (hour + HOUR).isoformat())["total"]
    # Then: 10 bytes for an hour
    for (*_, event), (kept,) in told:
        assert (kept["checkpoint_count"], kept["size_bytes"]) == (1, 10)
        assert event["event_info"]["gigabyte_hours"] == kept["size_bytes"] / 10**9
        assert Decimal(str(event["estimated_cost_usd"])) == Decimal(cost["cost"]) == Decimal("0.00001")
        assert kept["estimated_monthly_cost_usd"] == pytest.approx(720 * event["estimated_cost_usd"])
        assert cost["byte_seconds"] == kept["size_bytes"] * 3600

"""`tinker billing` of the installed SDK against a server: table, JSON and CSV, adding up to what was charged."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from billing import rate_cards, storage_metering
from billing.usage_totals import hour_of
from storage.accounts import get_account
from storage.clock import FrozenClock
from tests.factories import make_checkpoint, make_run, make_session
from tests.setups.deployment import Deployment
from tests.wire.conftest import Wire
from tests.wire.test_older_clients import TEXT, training_input

pytestmark = pytest.mark.processes

HOUR = timedelta(hours=1)


def tinker_cli(service: Deployment, *arguments: str, key: str = "") -> str:
    """What the SDK's command prints."""
    key = key or service.api_key
    environment = os.environ | {"TINKER_BASE_URL": service.url, "TINKER_API_KEY": key, "COLUMNS": "400"}
    command = [sys.executable, "-m", "tinker.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tinker_billing_agrees_with_what_was_charged(wire: Wire, service: Deployment) -> None:
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
    *_, event = json.loads(tinker_cli(service, "--format", "json", "billing", "usage", *window, key=key))["data"]
    (kept,) = json.loads(tinker_cli(service, "--format", "json", "billing", "checkpoint-storage", key=key))["data"]
    cost = service.command_json("cost", "--account", name, "--since", (hour + HOUR).isoformat())["total"]
    # Then: 10 bytes for an hour
    assert (kept["checkpoint_count"], kept["size_bytes"]) == (1, 10)
    assert event["event_info"]["gigabyte_hours"] == kept["size_bytes"] / 10**9
    assert Decimal(str(event["estimated_cost_usd"])) == Decimal(cost["cost"]) == Decimal("0.00001")
    assert kept["estimated_monthly_cost_usd"] == pytest.approx(720 * event["estimated_cost_usd"])
    assert cost["byte_seconds"] == kept["size_bytes"] * 3600

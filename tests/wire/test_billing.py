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

from tests.setups.deployment import Deployment
from tests.wire.conftest import Wire
from tests.wire.test_older_clients import TEXT, training_input

pytestmark = pytest.mark.processes

HOUR = timedelta(hours=1)


def tinker_cli(service: Deployment, *arguments: str) -> str:
    """What the SDK's command prints."""
    environment = os.environ | {"TINKER_BASE_URL": service.url, "TINKER_API_KEY": service.api_key, "COLUMNS": "400"}
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

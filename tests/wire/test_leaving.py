"""The client is killed in mid-training: what was accepted completes without it, and another process goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tinker
from tinker import types

from tests.setups.deployment import MODEL, Deployment
from tests.wire.conftest import Wire
from tests.wire.messages import datum

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0
LOOK_S = 0.05
STEPS = 60
SCRIPT = f"""
import sys, time
import tinker
from tinker import types
from tests.wire.messages import datum

service = tinker.ServiceClient(base_url=sys.argv[1], api_key=sys.argv[2])
training = service.create_lora_training_client({MODEL!r}, rank=4, seed=1).result()
data = [datum([5, 6, 7, 8, 9, 10 + number]) for number in range(8)]
pending = []
for step in range({STEPS}):
    pending.append(training.forward_backward(data, "cross_entropy"))
    pending.append(training.optim_step(types.AdamParams(learning_rate=1e-2)))
    if step == 1:
        state = training.save_state("left").result().path
        print(training.get_info().model_id, state, flush=True)
time.sleep(600)
"""


def train_and_be_killed(service: Deployment, wire: Wire) -> tuple[str, str]:
    """Run the script until it has pipelined work behind a checkpoint; returns its run and the checkpoint's path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, service.url, service.api_key]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        run, path = client.stdout.readline().split()
        wait_for(lambda: listed(wire, run)[-1]["seq"] > 10, "work behind the checkpoint")
        os.kill(client.pid, signal.SIGKILL)
    return run, path


def wait_for(holds: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"no {what} after {PATIENCE_S} s"
        time.sleep(LOOK_S)


def listed(wire: Wire, run: str) -> list[dict[str, Any]]:
    """A run's operations, over HTTP."""
    page = wire.http.get(f"/api/v1/training_runs/{run}/operations", params={"limit": 1000})
    rows: list[dict[str, Any]] = page.json()["operations"]
    return rows


def test_what_was_accepted_completes_and_another_process_goes_on(service: Deployment, wire: Wire) -> None:
    # given: a client that is killed with operations under way
    run, path = train_and_be_killed(service, wire)
    accepted = service.command_json("ops", run)["operations"]
    assert [row["seq"] for row in accepted] == list(range(len(accepted)))

    # then: everything that was accepted completes
    wait_for(lambda: all(row["status"] == "completed" for row in listed(wire, run)), "end of what was left")
    done = listed(wire, run)
    assert len(done) >= len(accepted)
    assert all(float(row["device_seconds"]) > 0 for row in done if row["kind"] == "forward_backward")

    # and: the results are there for who has the key and nothing else
    trained = [row["request_id"] for row in done if row["kind"] == "forward_backward"]
    results = [wire.http.get(f"/api/v1/operations/{request_id}/result").json() for request_id in trained]
    losses = [result["metrics"]["loss:sum"] for result in results]
    assert losses[-1] < losses[0]
    shown = next(row for row in service.command_json("runs")["runs"] if row["run"] == run)
    assert (shown["state_seq"], shown["num_open"]) == (done[-1]["seq"], 0)

    # and: the SDK in another process sees run and checkpoint, and trains on from it
    rest = tinker.RestClient(base_url=service.url, api_key=service.api_key)
    assert rest.get_training_run(run).result().base_model == MODEL
    assert [row.tinker_path for row in rest.list_checkpoints(run).result().checkpoints] == [path]
    with tinker.ServiceClient(base_url=service.url, api_key=service.api_key) as client:
        training = client.create_training_client_from_state_with_optimizer(path).result()
        forward = training.forward_backward([datum([5, 6, 7, 8, 9, 10])], "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        assert forward.result().metrics["loss:sum"] > 0


def test_a_client_that_finished_hears_it_and_what_it_had_submitted_completes(wire: Wire) -> None:
    # given: an operation under way
    run = wire.run()
    request_id = wire.step(run, 1)
    # when
    body = {"reason": {"type": "success"}, "detail": None}
    assert wire.post(f"sessions/{wire.session}/finish", body).status_code == 204
    # then
    assert wire.post("session_heartbeat", {"session_id": wire.session}).status_code == 410
    assert "metrics" in wire.result(request_id)
    assert json.loads(wire.http.get(f"/api/v1/operations/{request_id}").text)["status"] == "completed"

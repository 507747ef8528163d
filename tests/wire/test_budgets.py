"""A script over its cap waits in the SDK without an error, and goes on after a top-up as if nothing had been."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from sqlalchemy import update
from tinker import types

from billing import budgets, money
from billing.budgets import Scope
from storage import billing_tables, journal, runs, snapshots
from storage.failpoints import Point
from tests.setups.deployment import MODEL, Deployment
from tests.setups.test_sdk import make_datum, train
from tests.wire.test_leaving import wait_for

pytestmark = pytest.mark.processes

CARD = 'currency = "USD"\n[million_tokens."*"]\ntrained = "1000000"\n'
STEPS = 6
TOKENS = 3 * 24
"""Of a step; each costs one."""


HOUR_S = 3600.0
ROOT = Path(__file__).parents[2]


def deploy(directory: Path, model: Path, **settings: str) -> Deployment:
    """A service where a trained token costs one, and nothing else does."""
    (directory / "card.toml").write_text(CARD)
    settings |= {"PIECEWORK_RATE_CARD": str(directory / "card.toml"), "PIECEWORK_SWEEP_S": "0.5"}
    settings |= {"PIECEWORK_POLL_S": "2", "PIECEWORK_WARM_S": "1"}
    return Deployment(directory, model, settings=settings)


@pytest.fixture(scope="module")
def priced(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Deployment]:
    """One for all tests of this file."""
    deployed = deploy(tmp_path_factory.mktemp("priced"), tiny_model)
    yield deployed
    deployed.close()


@contextlib.contextmanager
def hurried_script(service: Deployment, account: str, *more: str) -> Iterator[Iterator[dict[str, Any]]]:
    """What a script over its cap tells, whose SDK believes that time flies while it waits."""
    api_key = service.create_account(account)
    # a little more than two steps: the third is refused, and nothing that was accepted waits
    service.command("budgets", "add", str(2 * TOKENS + 1), "--account", account)
    command = [sys.executable, "-m", "tests.wire.hurried_script", service.url, api_key, str(STEPS), *more]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None
        try:
            yield map(json.loads, script.stdout)
        finally:
            script.kill()


def losses(service: Deployment, api_key: str) -> list[tuple[float, float]]:
    """What a script sees that trains a fresh run."""
    with tinker.ServiceClient(base_url=service.url, api_key=api_key) as client:
        return train(client.create_lora_training_client(MODEL, rank=4, seed=1).result(), STEPS)


def test_a_script_over_its_cap_waits_and_ends_with_the_same_losses(priced: Deployment) -> None:
    # given
    cap = 3 * TOKENS
    capped = priced.create_account("capped")
    priced.command("budgets", "add", str(cap), "--account", "capped")

    def standing() -> dict[str, str]:
        with httpx.Client(headers={"X-API-Key": capped}) as http:
            (budget,) = http.get(f"{priced.url}/api/v1/budgets").json()["budgets"]
        return dict(budget)

    with ThreadPoolExecutor(1) as pool:
        # when
        script = pool.submit(losses, priced, capped)
        wait_for(lambda: standing()["state"] == "paused", "the pause")
        wait_for(lambda: priced.log().count("submission_refused") >= 2, "the SDK to ask again")
        # then: not a token more than the cap, and no error
        assert Decimal(standing()["spent"]) == cap
        assert not script.done()
        # when
        top_up = ("billing", "topup", str(STEPS * TOKENS), "--account", "capped", "--reference", "payment 1")
        assert [priced.command_json(*top_up)["new"] for _ in range(2)] == [True, False]
        # then
        assert script.result(timeout=240) == losses(priced, priced.api_key)
    assert Decimal(standing()["spent"]) == 0
    assert Decimal(standing()["held"]) == 0


def pipeline(training: tinker.TrainingClient, steps: int) -> list[Any]:
    """Submit so many steps; what each `forward_backward` will give."""
    pending = []
    for step in range(steps):
        data = [make_datum(place) for place in range(step, step + 3)]
        pending.append(training.forward_backward(data, "cross_entropy"))
        training.optim_step(types.AdamParams(learning_rate=2e-3))
    return pending


def test_accepted_work_stops_between_two_steps_is_written_back_and_goes_on_when_the_cap_is_raised(
    priced: Deployment,
) -> None:
    # given: many steps that were accepted before there was a cap
    steps, room = 30, 8 * TOKENS
    with tinker.ServiceClient(base_url=priced.url, api_key=priced.create_account("undisturbed")) as client:
        training = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
        undisturbed = [each.result().metrics["loss:sum"] for each in pipeline(training, steps)]
    api_key = priced.create_account("paused")
    with tinker.ServiceClient(base_url=priced.url, api_key=api_key) as client, priced.storage() as storage:
        training = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
        run_id = training.get_info().model_id
        priced.arm(Point.TURN_BEGUN, "stop")
        pending = pipeline(training, steps)
        stopped = priced.fired(Point.TURN_BEGUN)

        def is_all_accepted() -> bool:
            with storage.database.read() as tx:
                return len(journal.list_operations(tx, run_id, limit=3 * steps)) == 1 + 2 * steps

        wait_for(is_all_accepted, "all steps to be accepted")
        # when
        with storage.database.begin() as tx:
            run, now = runs.get_run(tx, run_id), storage.database.now(tx)
            added = budgets.add(tx, run.account_id, Scope.RUN, run_id, cap=0, now=now, is_hard=False)
            cap = added.spent + room * money.SCALE
            budgets.set_cap(tx, run.account_id, added.id, cap, now=now)
            tx.execute(update(billing_tables.budget).where(billing_tables.budget.c.id == added.id).values(is_hard=True))
        os.kill(stopped, signal.SIGCONT)

        def is_let_go() -> bool:
            with storage.database.read() as tx:
                found = runs.get_run(tx, run_id)
                (budget,) = budgets.list_budgets(tx, [run.account_id], now=storage.database.now(tx))
                newest = snapshots.newest_first(tx, run_id)
            written_back = bool(newest) and newest[0].seq == found.state_seq
            return budget.is_exhausted and found.lease_worker is None and written_back

        wait_for(is_let_go, "the pause, written back and let go")
        # then: not more than the step that reached the cap, and polls say what is waited for
        with storage.database.read() as tx:
            (budget,) = budgets.list_budgets(tx, [run.account_id], now=storage.database.now(tx))
            state_seq = runs.get_run(tx, run_id).state_seq
        assert cap <= budget.spent < cap + TOKENS * money.SCALE
        assert state_seq < 2 * steps
        with httpx.Client(headers={"X-API-Key": api_key}, timeout=30) as http:
            polled = http.post(f"{priced.url}/api/v1/retrieve_future", json={"request_id": f"{run_id}:{state_seq + 1}"})
        assert (polled.status_code, polled.json()["queue_state"]) == (408, "paused_capacity")
        assert polled.json()["queue_state_reason"].startswith(f"budget: budget {budget.id} (run {run_id}")
        # when: what held it dies, and the cap is raised
        priced.kill_worker()
        priced.command("budgets", "set", str(budget.id), str(2 * steps * TOKENS), "--account", "paused")
        # then
        assert [each.result(timeout=240).metrics["loss:sum"] for each in pending] == undisturbed


def test_a_script_waits_much_longer_than_the_sdk_does_by_default(priced: Deployment) -> None:
    # given
    with hurried_script(priced, "patient") as told:
        # when: by its own clock it has waited for six hours
        assert next(line for line in told if line["waited_s"] > 6 * HOUR_S).keys() == {"waited_s"}
        # then: whoever runs the service is told, too
        (budget,) = priced.command_json("budgets", "list", "--account", "patient")["budgets"]
        assert budget["state"] == "refusing"
        # when
        priced.command("billing", "topup", str(STEPS * TOKENS), "--account", "patient")
        *_, last = told
    # then
    assert [tuple(pair) for pair in last["losses"]] == losses(priced, priced.api_key)


def test_a_script_that_is_to_wait_for_an_hour_gives_up_after_it(priced: Deployment) -> None:
    # given: what the SDK does if nobody tells it otherwise, so the test above can fail
    with hurried_script(priced, "impatient", str(HOUR_S)) as told:
        # when
        *_, last = told
    # then
    assert "budget" in last["error"]
    assert HOUR_S <= last["waited_s"] < 6 * HOUR_S


def test_a_sample_over_its_cap_waits_too(priced: Deployment) -> None:
    # given
    capped = priced.create_account("sampler")
    (budget,) = priced.command_json("budgets", "add", str(TOKENS), "--account", "sampler")["budgets"]
    with tinker.ServiceClient(base_url=priced.url, api_key=capped) as client:
        training = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
        training.forward_backward([make_datum(place) for place in range(3)], "cross_entropy").result()
        # when
        sampling = client.create_sampling_client(base_model=MODEL).result()
        drawn = sampling.sample(
            types.ModelInput.from_ints([5, 6, 7]), 1, types.SamplingParams(max_tokens=4, seed=1)
        ).future()
        wait_for(lambda: "asample" in priced.log(), "the sample to be refused")
        assert not drawn.done()
        priced.command("budgets", "set", str(budget["id"]), str(2 * TOKENS), "--account", "sampler")
        # then
        assert len(drawn.result(timeout=240).sequences) == 1

"""A script over its cap waits in the SDK without an error, and goes on after a top-up as if nothing had been."""

from __future__ import annotations

import contextlib
import json
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
from tinker import types

from tests.setups.deployment import MODEL, NO_SPARE, Deployment
from tests.setups.test_sdk import make_datum, train
from tests.wire.test_leaving import wait_for

pytestmark = pytest.mark.processes

CARD = 'currency = "USD"\n[million_tokens."*"]\ntrained = "1000000"\n'
STEPS = 6
TOKENS = 3 * 24
"""Of a step; each costs one."""


HOUR_S, DAY_S = 3600.0, 86400.0
ROOT = Path(__file__).parents[2]


def deploy(directory: Path, model: Path, **settings: str) -> Deployment:
    """A service where a trained token costs one, and nothing else does."""
    (directory / "card.toml").write_text(CARD)
    settings |= {"PIECEWORK_RATE_CARD": str(directory / "card.toml"), "PIECEWORK_SWEEP_S": "0.5", **NO_SPARE}
    return Deployment(directory, model, settings=settings)


@pytest.fixture(scope="module")
def priced(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Deployment]:
    """One for all tests of this file."""
    deployed = deploy(tmp_path_factory.mktemp("priced"), tiny_model)
    yield deployed
    deployed.close()


@contextlib.contextmanager
def hurried_script(service: Deployment, account: str) -> Iterator[Iterator[dict[str, Any]]]:
    """What a script over its cap tells, whose SDK believes that time flies while it waits."""
    api_key = service.create_account(account)
    service.command("budgets", "add", str(2 * TOKENS), "--account", account)
    command = [sys.executable, "-m", "tests.wire.hurried_script", service.url, api_key, str(STEPS)]
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
        assert script.result(timeout=90) == losses(priced, priced.api_key)
    assert Decimal(standing()["spent"]) == 0
    assert Decimal(standing()["held"]) == 0


def test_a_script_waits_much_longer_than_the_sdk_does_by_default(priced: Deployment) -> None:
    # given
    with hurried_script(priced, "patient") as told:
        # when: by its own clock it has waited for a day
        assert next(line for line in told if line["waited_s"] > DAY_S).keys() == {"waited_s"}
        priced.command("billing", "topup", str(STEPS * TOKENS), "--account", "patient")
        *_, last = told
    # then
    assert [tuple(pair) for pair in last["losses"]] == losses(priced, priced.api_key)


def test_a_script_that_is_to_wait_for_an_hour_gives_up_after_it(tmp_path: Path, tiny_model: Path) -> None:
    # given: what the SDK does by default, so the test above can fail
    impatient = deploy(tmp_path, tiny_model, PIECEWORK_BUDGET_PAUSE_MAX_S=str(HOUR_S))
    try:
        # when
        with hurried_script(impatient, "impatient") as told:
            *_, last = told
    finally:
        impatient.close()
    # then
    assert "budget" in last["error"]
    assert HOUR_S < last["waited_s"] < DAY_S


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
        assert len(drawn.result(timeout=60).sequences) == 1

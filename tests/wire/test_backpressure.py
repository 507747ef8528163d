"""The SDK waits where too much waits: everything is accepted in the end, in order, and executed once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker
from tinker import types

from tests.setups.deployment import MODEL, Deployment
from tests.wire.messages import datum

pytestmark = pytest.mark.processes

TEXT = [5, 6, 7, 8, 9, 10]
NUM_SAMPLES = 6
NUM_STEPS = 3


@pytest.fixture
def narrow(tmp_path: Path, tiny_model: Path) -> Iterator[Deployment]:
    """A service in which two operations of an account may wait, and three of training."""
    settings = {"PIECEWORK_QUEUED_MAX_PER_ACCOUNT": "2", "PIECEWORK_QUEUED_TRAINING_FACTOR": "1.5"}
    deployed = Deployment(tmp_path, tiny_model, settings=settings)
    yield deployed
    deployed.close()


def test_the_sdk_waits_for_room(narrow: Deployment) -> None:
    with tinker.ServiceClient(base_url=narrow.url, api_key=narrow.api_key) as client:
        # given
        training = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
        sampling = client.create_sampling_client(base_model=MODEL).result()
        # when: much more than may wait is submitted at once
        params = types.SamplingParams(max_tokens=16, seed=1)
        samples = [sampling.sample(types.ModelInput.from_ints(TEXT), 1, params) for _ in range(NUM_SAMPLES)]
        steps, updates = [], []
        for _ in range(NUM_STEPS):
            steps.append(training.forward_backward([datum(TEXT)], "cross_entropy"))
            updates.append(training.optim_step(types.AdamParams(learning_rate=1e-2)))
        # then: all of it is executed
        assert len({tuple(sample.result().sequences[0].tokens) for sample in samples}) == 1
        losses = [step.result().metrics["loss:sum"] for step in steps]
        assert losses == sorted(losses, reverse=True)
        assert all("grad_norm" in (update.result().metrics or {}) for update in updates)
        run = training.get_info().model_id
    # and: some of it had to wait, samples and training
    refused = [line for line in narrow.log().splitlines() if "submission_refused" in line]
    assert any("asample" in line for line in refused)
    assert any("asample" not in line for line in refused)
    # and: once, and in order
    rows = narrow.command_json("ops", run)["operations"]
    assert [row["seq"] for row in rows] == list(range(1 + 2 * NUM_STEPS))
    assert {row["status"] for row in rows} == {"completed"}

"""Operations that end, block or fill up their worker fail alone; others are computed as if nothing had happened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker
from tinker import types

from tests.setups.deployment import MODEL, Deployment
from tests.setups.poison.sitecustomize import CRASH, HANG_THEN_CRASH, WANT_MEMORY
from tests.setups.test_sdk import draw, grad_norm, make_datum

POISON = Path(__file__).parent / "poison"
DEADLINE_S = 15
"""Far longer than an innocent step of the tiny model takes, also where others keep the processors busy."""


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Deployment]:
    """The embedded service; some tokens are poison to its worker."""
    path = os.pathsep.join([str(POISON), os.environ.get("PYTHONPATH", "")])
    settings = {"PYTHONPATH": path, "PIECEWORK_STEP_DEADLINE_S": str(DEADLINE_S)}
    deployed = Deployment(tmp_path_factory.mktemp("poisoned"), tiny_model, settings=settings)
    yield deployed
    deployed.close()


@pytest.fixture
def client(poisoned: Deployment) -> Iterator[tinker.ServiceClient]:
    """The official SDK, connected."""
    with tinker.ServiceClient(base_url=poisoned.url, api_key=poisoned.api_key) as connected:
        yield connected


Submitted = tuple[tinker.APIFuture[types.ForwardBackwardOutput], tinker.APIFuture[types.OptimStepResponse]]


def make_run(client: tinker.ServiceClient, seed: int) -> tinker.TrainingClient:
    """A new run."""
    return client.create_lora_training_client(MODEL, rank=8, seed=seed).result()


def step(training: tinker.TrainingClient, *data: types.Datum) -> Submitted:
    """Submit a pair of operations."""
    return (
        training.forward_backward(list(data), "cross_entropy"),
        training.optim_step(types.AdamParams(learning_rate=2e-3)),
    )


def innocent_steps(training: tinker.TrainingClient) -> list[Submitted]:
    """Submit four pairs."""
    return [step(training, make_datum(place), make_datum(place + 1)) for place in range(4)]


def results(steps: list[Submitted]) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    return [(passed.result().metrics["loss:sum"], grad_norm(stepped.result())) for passed, stepped in steps]


def poison(token: int) -> types.Datum:
    """A datum that does a worker harm."""
    tokens = [token, 5, 6, 7]
    inputs = {
        "target_tokens": types.TensorData(data=tokens, dtype="int64", shape=[4]),
        "weights": types.TensorData(data=[1.0] * 4, dtype="float32", shape=[4]),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


@pytest.mark.timeout(900)
@pytest.mark.processes
def test_a_pass_that_hangs_and_crashes_fails_alone(client: tinker.ServiceClient, poisoned: Deployment) -> None:
    # given the losses of an undisturbed run
    undisturbed = results(innocent_steps(make_run(client, seed=11)))

    # when the same is trained beside a run that submits poison, with a step pipelined behind it
    innocent, victim = make_run(client, seed=11), make_run(client, seed=12)
    passed, stepped = step(victim, make_datum(1), poison(HANG_THEN_CRASH))
    steps = innocent_steps(innocent)

    # then the poison fails with words, the step behind it too, and both runs go on
    with pytest.raises(tinker.RequestFailedError, match="ended its worker 3 times while it ran alone"):
        passed.result()
    with pytest.raises(tinker.RequestFailedError, match="forward_backward with seq_id 1 failed"):
        stepped.result()
    assert results(steps) == undisturbed
    assert len(results(innocent_steps(victim))) == 4

    # and the log says where the worker stood when it was ended
    assert "in hang_then_crash" in poisoned.log()


@pytest.mark.processes
def test_a_pass_that_wants_more_memory_than_there_is_fails_alone(client: tinker.ServiceClient) -> None:
    # given the losses of an undisturbed run
    undisturbed = results(innocent_steps(make_run(client, seed=11)))

    # when the same is trained beside a run that wants too much
    innocent, victim = make_run(client, seed=11), make_run(client, seed=12)
    passed, _ = step(victim, make_datum(1), poison(WANT_MEMORY))
    steps = innocent_steps(innocent)

    # then that one operation fails with words, and the worker lives
    with pytest.raises(tinker.RequestFailedError, match="does not fit into the worker's memory, even alone"):
        passed.result()
    assert results(steps) == undisturbed


@pytest.mark.timeout(900)
@pytest.mark.processes
def test_a_poisonous_sample_fails_alone(client: tinker.ServiceClient) -> None:
    # given what is drawn undisturbed
    sampling = client.create_sampling_client(base_model=MODEL).result()
    undisturbed = draw(sampling, seed=3)

    # when a prompt is poison
    params = types.SamplingParams(max_tokens=4, seed=1)
    failing = sampling.sample(types.ModelInput.from_ints([CRASH, 5]), num_samples=1, sampling_params=params)
    drawn = draw(sampling, seed=3)

    # then it fails with words, and others are drawn as before
    with pytest.raises(
        tinker.RequestFailedError, match=r"ended its worker 3 times while it ran alone \(3 x it crashed"
    ):
        failing.result()
    assert [(one.tokens, one.logprobs) for one in drawn] == [(one.tokens, one.logprobs) for one in undisturbed]

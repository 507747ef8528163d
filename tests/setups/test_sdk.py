"""The official SDK trains, saves, loads and samples, on every set-up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import tinker
from tinker import types

from tests.setups.deployment import MODEL, Deployment
from tests.tiny_model import VOCAB_SIZE

STEPS = 12


def make_datum(seed: int, length: int = 24, *, last: int | None = None) -> types.Datum:
    """A random sequence, every token of which is to be learned; `last` replaces the last target."""
    tokens = np.random.RandomState(seed).randint(3, VOCAB_SIZE, length + 1).tolist()
    tokens[-1] = tokens[-1] if last is None else last
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[length]),
            "weights": types.TensorData(data=[1.0] * length, dtype="float32", shape=[length]),
        },
    )


def train(training: tinker.TrainingClient, steps: int, *, first: int = 0) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, two steps pipelined at a time."""
    results: list[tuple[float, float]] = []
    for step in range(first, first + steps, 2):
        submitted = [
            (
                training.forward_backward([make_datum(place) for place in range(index, index + 3)], "cross_entropy"),
                training.optim_step(types.AdamParams(learning_rate=2e-3)),
            )
            for index in (step, step + 1)
        ]
        for forward_backward, optim_step in submitted:
            results.append((forward_backward.result().metrics["loss:sum"], grad_norm(optim_step.result())))
    return results


def grad_norm(response: types.OptimStepResponse) -> float:
    """The metric that stands for a whole gradient."""
    assert response.metrics is not None
    return response.metrics["grad_norm"]


def draw(sampling: tinker.SamplingClient, seed: int) -> Sequence[types.SampledSequence]:
    """Two continuations of a fixed prompt."""
    params = types.SamplingParams(max_tokens=6, seed=seed, temperature=0.8)
    return (
        sampling.sample(types.ModelInput.from_ints([5, 6, 7]), num_samples=2, sampling_params=params).result().sequences
    )


def test_training_lowers_the_loss_and_the_checkpoint_continues_exactly(client: tinker.ServiceClient) -> None:
    # given a run that has been trained, and its checkpoint
    training = client.create_lora_training_client(MODEL, rank=8, seed=1).result()
    losses = [loss for loss, _ in train(training, STEPS)]
    path = training.save_state("half-way").result().path

    # when another run continues from the checkpoint
    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    continued = train(resumed, 4, first=STEPS)

    # then it goes on exactly as the first one does
    assert losses[-1] < losses[0]
    assert continued == train(training, 4, first=STEPS)


def test_the_sampler_draws_from_the_trained_weights_and_repeats_itself(client: tinker.ServiceClient) -> None:
    # given a trained run and samplers of its weights and of the base model
    training = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    train(training, 4)
    trained = training.save_weights_and_get_sampling_client().result()
    base = client.create_sampling_client(base_model=MODEL).result()

    # when both draw with one seed
    first, second, plain = draw(trained, 7), draw(trained, 7), draw(base, 7)

    # then the same seed gives the same tokens, and training has changed what is likely
    assert [sequence.tokens for sequence in first] == [sequence.tokens for sequence in second]
    assert first[0].tokens != first[1].tokens
    assert [sequence.logprobs for sequence in first] != [sequence.logprobs for sequence in plain]


def test_sampler_and_trainer_agree_on_log_probabilities(client: tinker.ServiceClient) -> None:
    # given a trained run and a sampler of its weights
    training = client.create_lora_training_client(MODEL, rank=4, seed=3).result()
    train(training, 2)
    sampling = training.save_weights_and_get_sampling_client().result()
    datum = make_datum(1)
    tokens = [*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"].data[-1])]

    # when both score the same text
    by_trainer = training.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data
    by_sampler = sampling.compute_logprobs(types.ModelInput.from_ints(tokens)).result()

    # then they say the same
    assert by_sampler[0] is None
    np.testing.assert_allclose(by_sampler[1:], by_trainer, atol=1e-5)


def test_a_bad_operation_fails_alone_and_the_next_one_works(client: tinker.ServiceClient) -> None:
    # given a run
    training = client.create_lora_training_client(MODEL, rank=4, seed=4).result()
    bad = make_datum(1, last=VOCAB_SIZE)

    # when one operation names a token that does not exist
    with pytest.raises(tinker.RequestFailedError, match="target_tokens") as failure:
        training.forward_backward([bad], "cross_entropy").result()

    # then the error says whose fault it is, and the run goes on
    assert "user" in str(failure.value.category)
    assert len(train(training, 2)) == 2


def test_a_step_pipelined_behind_a_bad_operation_changes_nothing(client: tinker.ServiceClient) -> None:
    # given a run that has been trained, so that a step without gradients would move it
    training = client.create_lora_training_client(MODEL, rank=4, seed=6).result()
    train(training, 2)
    before = training.forward([make_datum(9)], "cross_entropy").result().metrics["loss:sum"]

    # when a step is pipelined behind an operation that makes no sense
    bad = training.forward_backward([make_datum(1, last=VOCAB_SIZE)], "cross_entropy")
    behind = training.optim_step(types.AdamParams(learning_rate=1e-2))

    # then both fail, and a step submitted afterwards works
    for failed in (bad, behind):
        with pytest.raises(tinker.RequestFailedError):
            failed.result()
    assert training.forward([make_datum(9)], "cross_entropy").result().metrics["loss:sum"] == before
    assert len(train(training, 2)) == 2


def test_what_was_used_is_on_the_bill(client: tinker.ServiceClient, deployment: Deployment) -> None:
    # given a run with a known number of operations
    training = client.create_lora_training_client(MODEL, rank=4, seed=5).result()
    train(training, 2)
    drawn = draw(training.save_weights_and_get_sampling_client().result(), 1)
    run_id = training.get_info().model_id

    # when its cost is asked for
    report = deployment.command_json("cost", "--run", run_id)

    # then every operation is there once, with its device time, and the rows add up to the total
    operations = {row["kind"]: row["operations"] for row in report["rows"]}
    assert operations == {
        "create_model": 1,
        "forward_backward": 2,
        "optim_step": 2,
        "save_weights_for_sampler": 1,
        "sample": 1,
    }
    by_kind = {row["kind"]: row for row in report["rows"]}
    assert by_kind["forward_backward"]["tokens_trained"] == 2 * 3 * 24
    assert by_kind["sample"]["tokens_sampled"] == sum(len(sequence.tokens) for sequence in drawn)
    assert float(by_kind["forward_backward"]["device_seconds"]) > 0
    assert report["total"]["operations"] == sum(operations.values())

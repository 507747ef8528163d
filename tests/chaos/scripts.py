"""What the clients run: `python -m tests.chaos.scripts NAME --url URL --record FILE --stop FILE`.

Each script repeats one round: new runs, the same data, the same seeds. So every round gives the same numbers, whatever
happens to the service meanwhile. A line of JSON is appended to the record for each result, the moment it is there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import tinker
from tinker import types

from tests.setups.deployment import MODEL

Values = Sequence[Any]
Round = Callable[[tinker.ServiceClient], Iterator[Values]]
LEARNING_RATE = 2e-3
VOCAB_SIZE = 320  # the tiny model's; imported from there, torch would come with it
CLOSE_S = 60.0
LONGEST = 120  # tokens: some payloads lie in the row, some in the object store


def supervised(client: tinker.ServiceClient) -> Iterator[Values]:
    """Train without a break, three steps pipelined, and save now and then."""
    training = client.create_lora_training_client(MODEL, rank=8, seed=1).result()
    for first in range(0, 12, 3):
        yield from _steps(training, range(first, first + 3))
        if first % 6 == 0:
            yield "saved", training.save_state(f"step-{first}").result().path.rpartition("/")[2]
    yield "weights", training.save_weights_for_sampler("last").result().path.rpartition("/")[2]


def resumed(client: tinker.ServiceClient) -> Iterator[Values]:
    """Train, save, go on, go back to what was saved, and go on from it in another run too."""
    training = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    yield from _steps(training, range(3))
    path = training.save_state("here").result().path
    yield from _steps(training, range(3, 5))
    training.load_state_with_optimizer(path).result()
    yield from _steps(training, range(3, 5))
    other = client.create_training_client_from_state_with_optimizer(path).result()
    yield from _steps(other, range(3, 6))


def reinforced(client: tinker.ServiceClient) -> Iterator[Values]:
    """Sample with the newest weights, pay for low tokens, train on what was sampled."""
    training = client.create_lora_training_client(MODEL, rank=4, seed=3).result()
    for step in range(4):
        sampling = training.save_weights_and_get_sampling_client().result()
        prompts = [types.ModelInput.from_ints([7 + step, *range(20, 20 + 8 * place)]) for place in (1, 3)]
        drawn = [
            sampling.sample(prompt, num_samples=3, sampling_params=_params(seed=10 * step + place))
            for place, prompt in enumerate(prompts)
        ]
        datums = []
        for prompt, future in zip(prompts, drawn, strict=True):
            sequences = future.result().sequences
            for sequence in sequences:
                yield "sampled", sequence.tokens, sequence.logprobs
            datums += _rewarded(prompt, sequences)
        forward_backward = training.forward_backward(datums, "importance_sampling")
        optim_step = training.optim_step(types.AdamParams(learning_rate=LEARNING_RATE))
        yield "reinforced", _loss(forward_backward), _grad_norm(optim_step)


ROUNDS: Mapping[str, Round] = {"supervised": supervised, "resumed": resumed, "reinforced": reinforced}


@click.command()
@click.argument("name", type=click.Choice(list(ROUNDS)))
@click.option("--url", required=True)
@click.option("--record", type=click.Path(path_type=Path), required=True, help="Gets a line for each result.")
@click.option("--stop", type=click.Path(path_type=Path), required=True, help="No round begins once this file is there.")
def main(name: str, url: str, record: Path, stop: Path) -> None:
    """Repeat one round until told to stop; the API key is in TINKER_API_KEY."""
    with record.open("a", buffering=1) as lines:
        number = 0
        while not stop.exists():
            client = tinker.ServiceClient(base_url=url, user_metadata={"script": name, "round": str(number)})
            for values in ROUNDS[name](client):
                print(json.dumps({"at": time.time(), "round": number, "values": values}), file=lines)
            _close(client)
            print(json.dumps({"at": time.time(), "round": number, "done": True}), file=lines)
            number += 1
    sys.exit(0)


def _close(client: tinker.ServiceClient) -> None:
    """Finish the session. The SDK (0.38) may wait for ever for a heartbeat whose cancellation it has swallowed."""
    try:
        client.close("success").result(timeout=CLOSE_S)
    except TimeoutError:
        print(f"the client could not be closed within {CLOSE_S:.0f} s", file=sys.stderr)


def _steps(training: tinker.TrainingClient, steps: Sequence[int]) -> Iterator[Values]:
    submitted = [
        (
            training.forward_backward([_datum(3 * step + place) for place in range(3)], "cross_entropy"),
            training.optim_step(types.AdamParams(learning_rate=LEARNING_RATE)),
        )
        for step in steps
    ]
    for step, (forward_backward, optim_step) in zip(steps, submitted, strict=True):
        yield "trained", step, _loss(forward_backward), _grad_norm(optim_step)


def _loss(forward_backward: tinker.APIFuture[types.ForwardBackwardOutput]) -> tuple[float, Sequence[float]]:
    """The whole loss, and the log-probabilities of the first datum, bit for bit."""
    output = forward_backward.result()
    return output.metrics["loss:sum"], list(output.loss_fn_outputs[0]["logprobs"].data)


def _grad_norm(optim_step: tinker.APIFuture[types.OptimStepResponse]) -> float:
    metrics = optim_step.result().metrics
    assert metrics is not None
    return metrics["grad_norm"]


def _datum(seed: int) -> types.Datum:
    random = np.random.RandomState(seed)
    length = int(random.randint(4, LONGEST))
    tokens = random.randint(3, VOCAB_SIZE, length + 1).tolist()
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": _integers(tokens[1:]), "weights": _floats([1.0] * length)},
    )


def _rewarded(prompt: types.ModelInput, sequences: Sequence[types.SampledSequence]) -> list[types.Datum]:
    rewards = [
        sum(token < VOCAB_SIZE // 2 for token in sequence.tokens) / len(sequence.tokens) for sequence in sequences
    ]
    mean = sum(rewards) / len(rewards)
    known = prompt.to_ints()
    datums = []
    for sequence, reward in zip(sequences, rewards, strict=True):
        assert sequence.logprobs is not None
        before = len(known) - 1
        inputs = [*known, *sequence.tokens[:-1]]
        datums.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(inputs),
                loss_fn_inputs={
                    "target_tokens": _integers([*known[1:], *sequence.tokens]),
                    "logprobs": _floats([0.0] * before + list(sequence.logprobs)),
                    "advantages": _floats([0.0] * before + [reward - mean] * len(sequence.tokens)),
                },
            )
        )
    return datums


def _params(seed: int) -> types.SamplingParams:
    return types.SamplingParams(max_tokens=12, seed=seed, temperature=0.9)


def _integers(values: Sequence[int]) -> types.TensorData:
    return types.TensorData(data=list(values), dtype="int64", shape=[len(values)])


def _floats(values: Sequence[float]) -> types.TensorData:
    return types.TensorData(data=list(values), dtype="float32", shape=[len(values)])


if __name__ == "__main__":
    main()

"""Trained and sampled tokens per second, and those of a plain transformers + peft loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.gpu import plain
from benchmarks.gpu.arguments import Arguments, device_name, parse_arguments
from benchmarks.gpu.models import make_operation, make_sized_model, make_state
from jobs.operations import Failure, LoraConfig, OptimStep, Sample, SamplingParams
from worker.engine.base_model import BaseModel
from worker.engine.optimizer import optim_step
from worker.engine.trainer import Trainer, TrainRequest
from worker.sampler.sampler import Sampler

RANK = 16
REPEATS = 3


@dataclass(frozen=True)
class Load:
    """What is trained and sampled for one figure."""

    num_runs: int
    datum_lengths: tuple[int, ...]
    num_sequences: int
    prompt_tokens: int
    sampled_tokens: int

    @property
    def trained_tokens(self) -> int:
        """Of all runs in one step."""
        return self.num_runs * sum(self.datum_lengths)


LOADS = {
    "nano": Load(2, (16, 8), 2, 8, 4),
    "tiny": Load(4, (128, 64, 96, 32, 160, 40), 16, 64, 32),
    "small": Load(4, (128, 64, 96, 32), 8, 64, 16),
    "0.6b": Load(4, (512, 300, 700, 128, 408), 64, 256, 128),
}


def best_seconds(work: Callable[[], None], device: torch.device) -> float:
    """Wall time of the fastest of some repeats, after one to warm up."""
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def measure_training(base_model: BaseModel, load: Load) -> float:
    """Tokens per second of forward, backward and step, all runs packed."""
    states = [make_state(base_model, LoraConfig(rank=RANK, seed=i)) for i in range(load.num_runs)]
    trainer = Trainer(base_model, tokens_max=8192, logprobs_chunk=1024)
    bodies = [
        make_operation(load.datum_lengths, vocab_size=base_model.vocab_size, seed=i) for i in range(load.num_runs)
    ]

    def step() -> None:
        report = trainer.run([TrainRequest(s, b) for s, b in zip(states, bodies, strict=True)])
        assert not any(isinstance(outcome, Failure) for outcome in report.outcomes), report.outcomes
        for state in states:
            optim_step(state, OptimStep(learning_rate=1e-5))

    return load.trained_tokens / best_seconds(step, base_model.device)


def measure_plain_training(arguments: Arguments, base_model: BaseModel, load: Load) -> float:
    """The same datums, one at a time, with one adapter."""
    state = make_state(base_model, LoraConfig(rank=RANK))
    model = plain.load_peft(make_sized_model(arguments.size, arguments.device, arguments.dtype), state)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    bodies = [
        make_operation(load.datum_lengths, vocab_size=base_model.vocab_size, seed=i) for i in range(load.num_runs)
    ]

    def step() -> None:
        for body in bodies:
            plain.forward_backward(model, body)
            optimizer.step()
            optimizer.zero_grad()

    return load.trained_tokens / best_seconds(step, base_model.device)


def measure_sampling(base_model: BaseModel, load: Load) -> float:
    """Sampled tokens per second of many sequences on two adapters, prefill included."""
    states = [make_state(base_model, LoraConfig(rank=RANK, seed=i)) for i in range(2)]
    kv_tokens = 2 * load.num_sequences * (load.prompt_tokens + load.sampled_tokens)
    sampler = Sampler(base_model, None, kv_tokens_max=kv_tokens, sequences_max=load.num_sequences, tokens_max=8192)
    draw = np.random.default_rng(0)

    def sample() -> None:
        for i in range(load.num_sequences):
            prompt = draw.integers(base_model.vocab_size, size=load.prompt_tokens)
            params = SamplingParams(max_tokens=load.sampled_tokens, seed=i, stop=())
            sampler.submit(str(i), Sample(prompt, params=params), states[i % 2].adapter)
        while sampler.has_work:
            sampler.step()

    return load.num_sequences * load.sampled_tokens / best_seconds(sample, base_model.device)


def main() -> None:
    """Print the figures."""
    arguments = parse_arguments()
    load = LOADS[arguments.size]
    model = make_sized_model(arguments.size, arguments.device, arguments.dtype)
    base_model = BaseModel(model, name=arguments.size)
    print(
        f"throughput on {device_name(arguments.device)}: {arguments.size} "
        f"({base_model.num_parameters / 1e6:.0f} M parameters, {arguments.dtype}), LoRA rank {RANK} everywhere"
    )
    training = measure_training(base_model, load)
    print(f"  train, {load.num_runs} runs packed   {training:10.0f} tokens/s")
    reference = measure_plain_training(arguments, base_model, load)
    print(f"  train, plain peft loop  {reference:10.0f} tokens/s   packed is {training / reference:.2f} times that")
    print(f"  sample, {load.num_sequences} sequences    {measure_sampling(base_model, load):10.0f} tokens/s")


if __name__ == "__main__":
    main()

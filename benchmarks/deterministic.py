"""The price of the deterministic setting: the same work with it on and off, and a cached prompt against a cold one.

Both sides run in one process, in turns, on models with the same weights. Of each pair of turns the ratio is taken, and
of the ratios the median: others on the machine disturb both sides alike. CPU time stands beside wall time, since it is
disturbed less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.conditions import OthersLoad, describe, table
from benchmarks.gpu.models import make_operation, make_sized_model, make_state
from jobs.operations import Failure, LoraConfig, Sample, SamplingParams
from worker.engine.base_model import BaseModel
from worker.engine.numerics import HEAD_ROWS, SEGMENT_TOKENS
from worker.engine.trainer import Trainer, TrainRequest
from worker.sampler.sampler import Sampler

RANK = 16
PROMPT_TOKENS = 64
LONG_PROMPT_TOKENS = 512

Work = Callable[[], int]
"""Does something once; returns the tokens that count."""


@dataclass(frozen=True)
class Turn:
    """How long one side took."""

    tokens: int
    wall_s: float
    cpu_s: float


def train(base_model: BaseModel, *, num_runs: int, lengths: tuple[int, ...]) -> Work:
    """`forward_backward` of several runs packed together."""
    sizes = {"segment_tokens": SEGMENT_TOKENS, "logprobs_chunk": HEAD_ROWS}
    if not base_model.deterministic:
        sizes = {"segment_tokens": 4096, "logprobs_chunk": 1024}
    trainer = Trainer(base_model, tokens_max=4096, **sizes)
    bodies = [make_operation(lengths, vocab_size=base_model.vocab_size, seed=seed) for seed in range(num_runs)]
    states = [make_state(base_model, LoraConfig(rank=RANK, seed=seed)) for seed in range(num_runs)]

    def work() -> int:
        requests = [TrainRequest(state, body) for state, body in zip(states, bodies, strict=True)]
        report = trainer.run(requests)
        assert not any(isinstance(outcome, Failure) for outcome in report.outcomes), report.outcomes
        return num_runs * sum(lengths)

    return work


def sample(base_model: BaseModel, *, num_sequences: int, num_new: int) -> Work:
    """Sequences of two adapters, prompts included."""
    states = [make_state(base_model, LoraConfig(rank=RANK, seed=seed)) for seed in range(2)]
    sampler = make_sampler(base_model)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(base_model.vocab_size, size=PROMPT_TOKENS) for _ in range(num_sequences)]

    def work() -> int:
        for number, prompt in enumerate(prompts):
            body = Sample(prompt, params=SamplingParams(max_tokens=num_new, seed=number, stop=()))
            sampler.submit(str(number), body, states[number % 2].adapter)
        run_out(sampler)
        return num_sequences * num_new

    return work


def first_token(base_model: BaseModel, *, cached: bool) -> Work:
    """One token behind a long prompt, which is in the cache or is not."""
    sampler = make_sampler(base_model)
    prompt = np.random.default_rng(1).integers(base_model.vocab_size, size=LONG_PROMPT_TOKENS)
    scopes = iter(range(1_000_000))

    def work() -> int:
        body = Sample(prompt, params=SamplingParams(max_tokens=1, seed=0, stop=()))
        sampler.submit("one", body, None, scope="warm" if cached else str(next(scopes)))
        run_out(sampler)
        return LONG_PROMPT_TOKENS

    work()
    return work


def make_sampler(base_model: BaseModel) -> Sampler:
    """With room for everything."""
    return Sampler(base_model, None, kv_tokens_max=64 * 256, sequences_max=64, tokens_max=4096)


def run_out(sampler: Sampler) -> None:
    """Step until all is done; nothing may have failed."""
    while sampler.has_work:
        for finished in sampler.step().finished:
            assert not isinstance(finished.outcome, Failure), finished.outcome


LOADS: dict[str, Callable[[BaseModel], Work]] = {
    "train, 8 runs × 4 datums of 32 tokens": lambda model: train(model, num_runs=8, lengths=(32,) * 4),
    "train, 1 run × 2 datums of 512 tokens": lambda model: train(model, num_runs=1, lengths=(512,) * 2),
    "sample, 1 sequence": lambda model: sample(model, num_sequences=1, num_new=16),
    "sample, 16 sequences": lambda model: sample(model, num_sequences=16, num_new=8),
    "sample, 64 sequences": lambda model: sample(model, num_sequences=64, num_new=4),
    "prefill, 512 tokens, cold": lambda model: first_token(model, cached=False),
}


def measure(work: Work) -> Turn:
    """One turn."""
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = work()
    return Turn(tokens, time.perf_counter() - wall, time.process_time() - cpu)


def compare(name: str, one: Work, other: Work, *, turns: int) -> tuple[str, ...]:
    """A row: throughput of both sides, and how many times as fast the first is as the second."""
    one(), other()
    pairs = [(measure(one), measure(other)) for _ in range(turns)]
    rates = [statistics.median(turn.tokens / turn.wall_s for turn in side) for side in zip(*pairs, strict=True)]
    wall = statistics.median(b.wall_s / a.wall_s for a, b in pairs)
    cpu = statistics.median(b.cpu_s / a.cpu_s for a, b in pairs)
    return (name, f"{rates[0]:.0f}", f"{rates[1]:.0f}", f"{wall:.2f}", f"{cpu:.2f}")


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description="price of the deterministic setting")
    parser.add_argument("--size", default="tiny", choices=("nano", "tiny", "small"), help="of the model")
    parser.add_argument("--turns", type=int, default=5, help="of each side")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    others = OthersLoad()
    on, off = (
        BaseModel(
            make_sized_model(arguments.size, torch.device("cpu"), torch.float32), name=name, deterministic=name == "on"
        )
        for name in ("on", "off")
    )
    print(f"{arguments.size}, fp32, LoRA rank {RANK}; {describe()}\n")
    print(table(("tokens/s", "on", "off", "on ÷ off, wall", "on ÷ off, CPU"), []), flush=True)
    for name, work in LOADS.items():
        row = compare(name, work(on), work(off), turns=arguments.turns)
        print(f"| {' | '.join(row)} |", flush=True)
    warm, cold = first_token(on, cached=True), first_token(on, cached=False)
    hit = compare("prompt of 512 tokens", warm, cold, turns=arguments.turns)
    print()
    print(table(("tokens/s until the first token", "hit", "cold", "hit ÷ cold, wall", "hit ÷ cold, CPU"), [hit]))
    print(f"\nOthers used {others.share():.0%} of the machine.")


if __name__ == "__main__":
    main()

"""Does the engine compute on this device what plain transformers and peft compute on CPU?"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import plain
from benchmarks.gpu.arguments import device_name, parse_arguments
from benchmarks.gpu.models import ARCHITECTURES, make_checked_model, make_operation, make_state
from jobs.operations import Array, ForwardBackwardOutcome, LoraConfig, Sample, SampleOutcome, SamplingParams
from worker.engine.base_model import BaseModel
from worker.engine.run_state import RunState
from worker.engine.trainer import Trainer, TrainRequest
from worker.sampler.sampler import Sampler

FINE, COARSE = 1e-4, 0.1
LORA = LoraConfig(rank=8, seed=3)
OTHER_LORA = LoraConfig(rank=4, seed=5, train_mlp=False)


@dataclass(frozen=True)
class Check:
    """One comparison: a difference relative to the largest number, and how much of it is allowed."""

    name: str
    difference: float
    allowed: float

    @property
    def holds(self) -> bool:
        """NaN does not."""
        return self.difference <= self.allowed


def check_architecture(architecture: str, device: torch.device) -> list[Check]:
    """Every comparison for one architecture."""
    body = make_operation((5, 61, 130), vocab_size=256, seed=1)
    company = make_operation((90, 3), vocab_size=256, seed=2)
    base_model = BaseModel(make_checked_model(architecture).to(device), name=architecture)
    alone, together = make_state(base_model, LORA), make_state(base_model, LORA)
    outcome = _run(base_model, TrainRequest(alone, body))
    other = make_state(base_model, OTHER_LORA)
    packed = _run(base_model, TrainRequest(together, body), TrainRequest(other, company))

    reference = plain.load_peft(make_checked_model(architecture), alone)
    wanted = [tensor.numpy() for tensor in plain.forward_backward(reference, body)]
    wanted_gradients = plain.gradients(reference)
    gradients, packed_gradients = alone.gradients.to_peft_tensors(), together.gradients.to_peft_tensors()

    half = BaseModel(make_checked_model(architecture).to(device, torch.bfloat16), name=architecture)
    rounded = _run(half, TrainRequest(make_state(half, LORA), body))
    return [
        Check("log-probabilities = peft on CPU", _difference(outcome.logprobs, wanted), FINE),
        Check(
            "gradients = peft on CPU", max(_difference([gradients[n]], [g]) for n, g in wanted_gradients.items()), FINE
        ),
        Check("packed = alone, log-probabilities", _difference(packed.logprobs, outcome.logprobs), FINE),
        Check(
            "packed = alone, gradients",
            max(_difference([packed_gradients[n]], [g]) for n, g in gradients.items()),
            FINE,
        ),
        Check("bfloat16 ≈ float32, on average", _average_difference(rounded.logprobs, wanted), COARSE),
        *_check_sampler(architecture, base_model, alone),
    ]


def _check_sampler(architecture: str, base_model: BaseModel, state: RunState) -> list[Check]:
    """Greedy samples of device and CPU agree, and the sampler's log-probabilities are the trainer's."""
    on_cpu = BaseModel(make_checked_model(architecture), name=architecture)
    sampled, wanted = _sample(base_model, state), _sample(on_cpu, make_state(on_cpu, LORA))
    prompt, tokens = _sample_body().prompt, sampled.sequences[0].tokens
    sequence = np.concatenate([prompt, tokens]).astype(np.int64)
    body = make_operation((len(sequence) - 1,), vocab_size=256, seed=0)
    datum = body.data[0]
    datum.tokens[:], datum.inputs["target_tokens"][:] = sequence[:-1], sequence[1:]
    trained = _run(base_model, TrainRequest(state, body)).logprobs[0][len(prompt) - 1 :]
    return [
        Check("greedy tokens = CPU", float((tokens != wanted.sequences[0].tokens).sum()), 0.0),
        Check("sampler = trainer, log-probabilities", _difference([sampled.sequences[0].logprobs], [trained]), FINE),
    ]


def _sample_body() -> Sample:
    prompt = np.random.default_rng(9).integers(256, size=20)
    return Sample(prompt, params=SamplingParams(max_tokens=24, temperature=0.0, stop=()))


def _sample(base_model: BaseModel, state: RunState) -> SampleOutcome:
    sampler = Sampler(base_model, None, kv_tokens_max=1024, sequences_max=4, tokens_max=256)
    sampler.submit("greedy", _sample_body(), state.adapter)
    while sampler.has_work:
        for finished in sampler.step().finished:
            assert isinstance(finished.outcome, SampleOutcome), finished.outcome
            return finished.outcome
    raise AssertionError("the sampler stopped without an outcome")


def _run(base_model: BaseModel, *requests: TrainRequest) -> ForwardBackwardOutcome:
    outcome = Trainer(base_model, tokens_max=4096, logprobs_chunk=64).run(requests).outcomes[0]
    assert isinstance(outcome, ForwardBackwardOutcome), outcome
    return outcome


def _difference(actual: Any, wanted: Any) -> float:
    pairs: list[tuple[Array, Array]] = [(np.asarray(a), np.asarray(w)) for a, w in zip(actual, wanted, strict=True)]
    largest = max(1.0, *(float(np.abs(w).max()) for _, w in pairs))
    return max(float(np.abs(a - w).max()) for a, w in pairs) / largest


def _average_difference(actual: Any, wanted: Any) -> float:
    """On average, since rounding sends some tokens of a mixture model to other experts."""
    one, other = np.concatenate(list(actual)), np.concatenate(list(wanted))
    return float(np.abs(one - other).mean() / np.abs(other).mean())


def main() -> int:
    """Print every comparison; 1 if one does not hold."""
    arguments = parse_arguments()
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"numerics on {device_name(arguments.device)}, torch {torch.__version__}")
    failed = 0
    for architecture in ARCHITECTURES:
        for check in check_architecture(architecture, arguments.device):
            failed += not check.holds
            verdict = "ok" if check.holds else "DIFFERS"
            print(f"  {architecture:10} {check.name:38} {check.difference:9.1e} (≤ {check.allowed:.0e})  {verdict}")
    print("all hold" if not failed else f"{failed} do not hold")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""The independent reference: plain `transformers`, `peft` and autograd, one datum at a time, without packing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor

from jobs.operations import Datum, ForwardBackward
from worker.engine.run_state import RunState


def load_peft(model: Any, state: RunState, directory: Path) -> Any:
    """The plain model with the run's adapter, loaded by `peft` from the files that a user downloads."""
    for name, data in state.sampler_files().items():
        (directory / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft's own: tied embeddings, deprecated names in transformers
        return peft.PeftModel.from_pretrained(model, directory, is_trainable=True)


def logprobs_of(model: Any, datum: Datum) -> Tensor:
    """Log-probabilities of the datum's targets, `[N]` or `[N, K]`."""
    logits = model(torch.tensor(datum.tokens)[None]).logits[0].float()
    targets = torch.tensor(datum.inputs["target_tokens"])
    columns = targets if targets.ndim == 2 else targets[:, None]
    return torch.log_softmax(logits, -1).gather(1, columns).view(targets.shape)


def loss_of(body: ForwardBackward, datum: Datum, logprobs: Tensor) -> Tensor:
    """The loss of one datum, written out as the protocol describes it."""
    inputs = {name: torch.tensor(np.array(values)) for name, values in datum.inputs.items()}
    config = {"ppo": (0.8, 1.2), "cispo": (0.0, 4.0)}.get(body.loss_fn, (0.0, 0.0))
    low = inputs.get("clip_low_threshold", float(body.loss_config.get("clip_low_threshold", config[0])))
    high = inputs.get("clip_high_threshold", float(body.loss_config.get("clip_high_threshold", config[1])))
    if body.loss_fn == "cross_entropy":
        return -(inputs.get("weights", torch.ones(())) * logprobs).sum()
    sampled, advantages = inputs["logprobs"], inputs["advantages"]
    ratio = (logprobs - sampled).exp()
    if body.loss_fn == "importance_sampling":
        return -(ratio * advantages).sum()
    if body.loss_fn == "ppo":
        return -torch.min(ratio * advantages, ratio.clip(low, high) * advantages).sum()
    if body.loss_fn == "cispo":
        return -(ratio.clip(low, high).detach() * logprobs * advantages).sum()
    beta = float(body.loss_config.get("beta", 0.05))
    return -(logprobs * advantages - 0.5 * beta * (logprobs - sampled) ** 2).sum()


def run(model: Any, body: ForwardBackward) -> tuple[list[Tensor], float]:
    """Log-probabilities per datum and the loss; gradients are added to the adapter's `.grad`."""
    logprobs, total = [], 0.0
    for datum in body.data:
        logprobs.append(logprobs_of(model, datum))
        loss = loss_of(body, datum, logprobs[-1])
        loss.backward()
        total += loss.item()
    return [tensor.detach() for tensor in logprobs], total


def adapter_tensors(model: Any, *, gradients: bool = False) -> dict[str, Tensor]:
    """Weights or gradients of the adapter by PEFT's names in files."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            value = parameter.grad if gradients else parameter
            tensors[name.replace(".default.", ".")] = torch.zeros_like(parameter) if value is None else value.detach()
    return tensors

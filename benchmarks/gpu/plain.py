"""The reference: plain `transformers` and `peft`, one datum at a time."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from jobs.operations import ForwardBackward
from worker.engine.run_state import RunState


def load_peft(model: Any, state: RunState) -> Any:
    """The plain model with the run's adapter, loaded by `peft` from the files a user downloads."""
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft's own, about tied embeddings
        for name, data in state.sampler_files().items():
            Path(directory, name).write_bytes(data)
        return peft.PeftModel.from_pretrained(model, directory, is_trainable=True)


def forward_backward(model: Any, body: ForwardBackward) -> list[Tensor]:
    """Log-probabilities of each datum's targets; gradients go to the adapter's `.grad`."""
    device, logprobs = model.device, []
    for datum in body.data:
        logits = model(torch.tensor(datum.tokens, device=device)[None]).logits[0].float()
        targets = torch.tensor(datum.inputs["target_tokens"], device=device)
        found = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
        weights = torch.tensor(datum.inputs["weights"], device=device)
        (-(weights * found).sum()).backward()
        logprobs.append(found.detach())
    return logprobs


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients of the adapter by PEFT's names in files, on CPU."""
    return {
        name.replace(".default.", "."): parameter.grad.cpu()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }

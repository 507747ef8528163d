"""An adapter's files as `peft` reads and writes them."""

from __future__ import annotations

import json
from dataclasses import asdict

from jobs.operations import LoraConfig
from worker.engine.adapter import Adapter
from worker.engine.base_model import BaseModel
from worker.engine.errors import UnreadableStateError
from worker.engine.files import read_tensors, write_tensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(adapter: Adapter, base_model_name: str) -> dict[str, bytes]:
    """Content by file name; `peft.PeftModel.from_pretrained` loads the directory they lie in."""
    config, tensors = adapter.to_peft(base_model_name)
    metadata = {
        "format": "pt",
        "base_model": base_model_name,
        "lora": json.dumps(asdict(adapter.lora), sort_keys=True),
    }
    return {
        CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True).encode(),
        WEIGHTS_FILE: write_tensors(tensors, metadata),
    }


def read_adapter(base_model: BaseModel, data: bytes) -> Adapter:
    """The adapter that `write_adapter` gave `adapter_model.safetensors` of, also if it is a checkpoint.

    Raises:
        UnreadableStateError: damaged, not written by this service, or of another base model.
    """
    tensors, metadata = read_tensors(data)
    if metadata.get("base_model") != base_model.name:
        raise UnreadableStateError(
            f"adapter was trained on {metadata.get('base_model')!r}, it cannot be used on {base_model.name!r}"
        )
    try:
        lora = LoraConfig(**json.loads(metadata["lora"]))
    except (KeyError, ValueError, TypeError) as error:
        raise UnreadableStateError("adapter does not say its LoRA configuration; it is damaged") from error
    weights = {key: tensor for key, tensor in tensors.items() if not key.startswith("optimizer.")}
    return Adapter.from_peft(base_model.layout(lora), lora, weights, base_model.device)

"""What a worker does before its first operation, done on nothing: what is loaded on the way stays loaded.

A fork server does this before it makes workers of itself. It reaches no server, writes nothing and computes nothing.
"""

from __future__ import annotations

import torch
from kombu import Connection
from transformers import AutoModelForCausalLM, Qwen3Config

from jobs.app import make_app
from jobs.settings import JobsSettings
from worker.process import make_consumer
from worker.settings import WorkerSettings

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
}


def rehearse() -> None:
    """Join what a worker is made of, as far as nobody notices, and a base model of shapes alone."""
    settings = JobsSettings()
    with make_app(settings) as app, Connection(settings.resolved_broker_url()) as connection:
        make_consumer(app, WorkerSettings(), "rehearsal")
        connection.transport  # noqa: B018 (loads the broker's library)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(Qwen3Config(**TINY), attn_implementation="sdpa")

"""How a worker computes. Read once per process from `PIECEWORK_…`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class WorkerSettings(BaseSettings):
    """Device, sizes and times of one worker process."""

    model_config = SettingsConfigDict(env_prefix="PIECEWORK_", extra="ignore")

    worker_id: str = Field(
        "", description="name of the worker in leases and usage records; empty: host, pid and a token"
    )
    device: str = Field("auto", description="cpu, cuda:0 …; auto takes cuda:0 where there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of base weights; auto takes what the model was added with"
    )
    deterministic: Literal["auto", "on", "off"] = Field(
        "auto", description="results bit for bit the same in any company and on any worker alike; auto: on CPU only"
    )
    threads: int = Field(0, description="CPU threads of torch; 0: what torch chooses. Bits depend on it")
    tokens_max: int = Field(
        4096, description="tokens of one packed training pass (a longer datum or segment goes alone)"
    )
    logprobs_chunk: int = Field(1024, description="tokens whose logits exist at once; 256 if deterministic")
    kv_tokens_max: int = Field(65_536, description="tokens whose keys and values the sampler keeps")
    sequences_max: int = Field(64, description="sequences sampled in one step")
    base_models_max: int = Field(2, description="base models kept in memory")
    run_states_max: int = Field(32, description="idle run states kept in memory")
    lease_s: float = Field(10.0, description="a lease not renewed this long may be taken by another worker")
    slice_s: float = Field(5.0, description="after this long a run's message is handed back, so that others get a turn")
    step_deadline_s: float = Field(
        900.0, description="a worker whose engine makes no progress this long ends itself, so that another takes over"
    )
    samples_max: int = Field(256, description="sample operations claimed at once")
    warm_s: float = Field(30.0, description="an idle run is kept warm (lease and state) this long")
    client_silent_s: float = Field(
        60.0, description="an idle run whose client has not been heard of this long is not kept warm; nothing is lost"
    )
    writeback_s: float = Field(
        1.0, ge=0, description="least time from the beginning of one snapshot of a run to that of its next"
    )
    replay_tail_s: float = Field(
        30.0,
        gt=0,
        description="device time that a death may make others compute again, per run; a run whose newest snapshot "
        "lies further back waits until it has been stored",
    )
    replay_bound: float = Field(
        0.05,
        ge=0,
        description="on CUDA: how far an outcome that is computed again may lie from the one on record before that is "
        "an alarm (log-probabilities by root mean square, sums per target, other metrics relatively); on CPU every bit "
        "counts",
    )
    concurrency: int = Field(16, description="runs and sampling queues a worker takes messages of at once")
    cache_dir: Path = Field(
        Path("~/.cache/piecework"), description="where base models fetched from the object store are kept on disk"
    )

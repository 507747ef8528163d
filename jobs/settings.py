"""How work is announced and waited for. Read once per process from `PIECEWORK_…`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from urllib.parse import quote

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

BROKER_SOCKET = "broker.sock"
SOCKET_PATH_BYTES_MAX = 100  # the kernel's limit is 107, on macOS 103


class JobsSettings(BaseSettings):
    """Broker, limits of the queue, timeouts and retention."""

    model_config = SettingsConfigDict(env_prefix="PIECEWORK_", extra="ignore")

    data_dir: Path = Field(Path(".piecework"), description="directory of the embedded service")
    broker_url: str = Field(
        "", description="redis://host:port/0 or amqp://user:password@host:port//; empty: the embedded broker of `serve`"
    )
    queued_max_per_account: int = Field(
        20_000, gt=0, description="operations of one account that may wait for execution; more samples are answered 429"
    )
    queued_max: int = Field(100_000, gt=0, description="the same for all accounts together")
    queued_bytes_max_per_account: int = Field(
        4 * 2**30, gt=0, description="bytes of payload of one account's operations that wait for execution"
    )
    queued_bytes_max: int = Field(16 * 2**30, gt=0, description="the same for all accounts together")
    queued_training_factor: float = Field(
        2.0, ge=1, description="training operations are answered 429 only beyond so many times these four limits"
    )
    gap_timeout_s: float = Field(
        600.0, description="a `seq` that has not arrived this long after a later one is closed with an error"
    )
    result_retention_s: float = Field(7 * 86_400.0, description="results are kept this long, then answered 410")
    sampling_session_idle_s: float = Field(
        86_400.0, description="weights of sampling sessions are let go this long after their client was last heard of"
    )
    safety_read_s: float = Field(1.0, description="how often waiting polls are looked up without having been woken")
    sweep_s: float = Field(2.0, description="how often stalled work is looked for and announced again")
    object_sweep_s: float = Field(
        60.0, description="how often what has expired, and objects that nothing needs any more, are deleted"
    )
    stalled_after_s: float = Field(
        4.0, description="work that waits this long while nobody holds its run's lease is announced again"
    )
    message_expires_s: float = Field(
        60.0, description="a message not taken this long is dropped; the sweeper re-announces"
    )

    def broker_socket(self) -> Path:
        """Where the embedded broker listens: in the data directory, or below /tmp where that path is too long."""
        path = self.data_dir.absolute() / BROKER_SOCKET
        if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
            return path
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:24]
        return Path(f"/tmp/piecework-{os.getuid()}") / f"{digest}.sock"  # noqa: S108 (its directory is ours alone)

    def resolved_broker_url(self) -> str:
        """The URL in force: the broker's socket in the data directory unless another is set."""
        return self.broker_url or f"redis+socket://{quote(str(self.broker_socket()))}"

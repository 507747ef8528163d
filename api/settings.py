"""How the api listens and what it accepts. Read once per process from `PIECEWORK_…`."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class ApiSettings(BaseSettings):
    """Address, limits and waiting times of the HTTP service."""

    model_config = SettingsConfigDict(env_prefix="PIECEWORK_", extra="ignore")

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8787, description="port to listen on")
    public_url: str = Field(
        "", description="URL under which clients reach the service, for signed links; empty: host and port"
    )
    body_bytes_max: int = Field(256 * 2**20, description="largest body of a training request, after decompression")
    json_bytes_max: int = Field(32 * 2**20, description="largest JSON body; JSON takes many times its size in memory")
    api_threads: int = Field(12, description="threads for requests; each may hold one database connection")
    poll_s: float = Field(25.0, description="how long `retrieve_future` holds a request before it answers 408")
    budget_pause_max_s: int = Field(
        30 * 24 * 3600, description="how long the SDK waits when a cap has no room, before it raises an error"
    )
    signed_url_s: int = Field(3600, description="how long a download link is valid")
    url_signing_key: str = Field(
        "", repr=False, description="secret that signs download links; empty: one made in the data directory"
    )


class SupervisorSettings(BaseSettings):
    """What `piecework serve` and `piecework worker` do for a worker that dies."""

    model_config = SettingsConfigDict(env_prefix="PIECEWORK_", extra="ignore")

    forkserver: bool = Field(
        True,
        description="a process that has everything loaded makes the workers, so that one that dies is replaced at once "
        "(Linux); false: each loads by itself, which takes seconds",
    )
    supervise_worker: bool = Field(
        True, description="`piecework worker` restarts its worker; false: it becomes the worker process itself"
    )

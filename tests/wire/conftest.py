"""The embedded service as real processes, started once, with a tiny random base model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker

from tests.setups.deployment import MODEL, Deployment

PROTOBUF = "application/x-protobuf"
TIMEOUT_S = 180.0


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Deployment]:
    """`piecework serve`, running."""
    deployed = Deployment(tmp_path_factory.mktemp("wire"), tiny_model)
    yield deployed
    deployed.close()


@dataclasses.dataclass(frozen=True)
class Wire:
    """Raw HTTP as a client of the protocol sends it: exact bodies, answers as they are.

    Attributes:
        session: id of a session that is open.
        base_model: the one that is served.
    """

    http: httpx.Client
    session: str
    base_model: str = MODEL

    def post(self, route: str, body: Any = None, **kwargs: Any) -> httpx.Response:
        """One call; the body is JSON unless `content` is given."""
        return self.http.post(f"/api/v1/{route}", json=body, **kwargs)

    def submit(self, route: str, body: Any = None, **kwargs: Any) -> str:
        """A submission; its request id."""
        answer = self.post(route, body, **kwargs)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["request_id"])

    def submit_protobuf(self, content: bytes, **headers: str) -> str:
        """A `forward_backward` as protobuf; its request id."""
        return self.submit("forward_backward", content=content, headers={"Content-Type": PROTOBUF} | headers)

    def outcome(self, request_id: str, accept: str = "application/json") -> httpx.Response:
        """The final answer to a poll, which is repeated as the SDK does."""
        while True:
            body = {"request_id": request_id, "allow_metadata_only": True}
            answer = self.post("retrieve_future", body, headers={"Accept": accept})
            if answer.status_code != 408:
                return answer

    def result(self, request_id: str) -> Any:
        """The JSON result of an operation that must succeed."""
        answer = self.outcome(request_id)
        assert answer.status_code == 200, answer.text
        assert "error" not in answer.json(), answer.text
        return answer.json()

    def failure(self, request_id: str) -> Any:
        """The error of an operation that must fail."""
        answer = self.outcome(request_id)
        assert answer.status_code == 200, answer.text
        assert "error" in answer.json(), answer.text
        return answer.json()

    def run(self, number: int = 0, **lora: Any) -> str:
        """A run that has been made."""
        body = {
            "session_id": self.session,
            "model_seq_id": number,
            "base_model": self.base_model,
            "lora_config": {"rank": 4, "seed": 1, "train_unembed": True, "train_mlp": True, "train_attn": True} | lora,
            "optimizer_config": {"type": "adamw"},
            "type": "create_model",
        }
        return str(self.result(self.submit("create_model", body))["model_id"])

    def step(self, run: str, seq: int, **params: Any) -> str:
        """An optimizer step; its request id."""
        adam = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12} | params
        return self.submit("optim_step", {"model_id": run, "seq_id": seq, "adam_params": adam, "type": "optim_step"})


@pytest.fixture
def wire(service: Deployment) -> Iterator[Wire]:
    """Raw HTTP, with a session of its own."""
    headers = {"X-API-Key": service.api_key}
    with httpx.Client(base_url=service.url, headers=headers, timeout=TIMEOUT_S) as http:
        body = {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0", "type": "create_session"}
        session = http.post("/api/v1/create_session", json=body).json()["session_id"]
        yield Wire(http, session)


@pytest.fixture
def client(service: Deployment) -> Iterator[tinker.ServiceClient]:
    """The official SDK, connected."""
    with tinker.ServiceClient(base_url=service.url, api_key=service.api_key) as connected:
        yield connected

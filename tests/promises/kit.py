"""What the promises' tests share: a client that is as patient as the SDK, one training program, and the bill.

The program of a run is fixed by `seq`: odd numbers are a `forward_backward` over a batch of that number, even ones an
optimizer step. So any run of the same seed must give the same results, to the last bit.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np
from sqlalchemy import select

from storage import billing_tables, tables
from tests.setups.deployment import LOOK_S, START_S, Deployment
from tests.tiny_model import VOCAB_SIZE
from tests.wire.conftest import Wire
from tests.wire.messages import datum, forward_backward

PROGRAM = range(1, 13)
BATCH = 3
LENGTH = 24
PROMPT = [5, 6, 7, 8]


class PatientWire(Wire):
    """Raw HTTP that repeats a call until it is answered, as the SDK does with connections that break and with 5xx."""

    def post(self, route: str, body: Any = None, **kwargs: Any) -> httpx.Response:
        """One call, repeated until the service is there."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                answer = super().post(route, body, **kwargs)
                if answer.status_code < 500:
                    return answer
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
            assert time.monotonic() < deadline, f"{route} is not answered"
            time.sleep(LOOK_S)

    def result(self, request_id: str) -> Any:
        """Its result, without what the run has cost by now: device time is never twice the same."""
        found = super().result(request_id)
        found.get("metrics", {}).pop("cost_usd", None)
        return found

    def submit_seq(self, run: str, seq: int) -> str:
        """Operation `seq` of the program; its request id."""
        return self.step(run, seq) if seq % 2 == 0 else self.submit_protobuf(forward_backward(run, seq, batch(seq)))

    def run_program(self, run: str, seqs: Sequence[int] = PROGRAM) -> list[Any]:
        """The results of these operations, all submitted before the first is asked for."""
        return [self.result(request_id) for request_id in [self.submit_seq(run, seq) for seq in seqs]]

    def sampler(self, number: int = 0) -> str:
        """A sampling session on the base model."""
        body = {"session_id": self.session, "sampling_session_seq_id": number, "base_model": self.base_model}
        return str(self.post("create_sampling_session", body).json()["sampling_session_id"])

    def sample(self, sampler: str, seq: int = 0, *, seed: int = 1, max_tokens: int = 6) -> str:
        """A sample of two sequences; its request id."""
        body = {
            "sampling_session_id": sampler,
            "seq_id": seq,
            "num_samples": 2,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]},
            "sampling_params": {"max_tokens": max_tokens, "seed": seed, "temperature": 0.8},
            "type": "sample",
        }
        return self.submit("asample", body)


def batch(number: int) -> list[Any]:
    """Datums that depend on the number alone."""
    numbers = np.random.RandomState(number)
    return [datum(numbers.randint(3, VOCAB_SIZE, LENGTH).tolist()) for _ in range(BATCH)]


@dataclasses.dataclass(frozen=True)
class Billed:
    """One operation of the journal and the usage records that name it.

    Attributes:
        usage: one tuple a record: kind, tokens trained, prefilled and cached, sampled, attempt, worker.
    """

    request_id: str
    status: str
    attempts: int
    usage: Sequence[tuple[Any, ...]]

    @property
    def amounts(self) -> list[tuple[Any, ...]]:
        """What is billed, without whose work it was."""
        return [record[:4] for record in self.usage]


def billed(deployment: Deployment, *, run: str | None = None, request_id: str | None = None) -> list[Billed]:
    """A run's operations in order, or the one of a request id, each with its usage records."""
    operation, record = tables.operation.c, billing_tables.usage_record.c
    which = operation.run_id == run if run is not None else operation.request_id == request_id
    prefilled = record.tokens_prefilled + record.tokens_cached
    amounts = (record.kind, record.tokens_trained, prefilled, record.tokens_sampled, record.attempt, record.worker_id)
    with deployment.storage() as storage, storage.database.read() as tx:
        rows = tx.execute(select(operation).where(which).order_by(operation.seq)).all()
        return [
            Billed(
                row.request_id,
                row.status,
                row.attempts,
                [tuple(found) for found in tx.execute(select(*amounts).where(record.operation_id == row.id))],
            )
            for row in rows
        ]


def wait_until(holds: Callable[[], bool], what: str, deployment: Deployment) -> None:
    """Look until something holds."""
    deadline = time.monotonic() + START_S
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {START_S} s\n{deployment.log()[-4000:]}"
        time.sleep(LOOK_S)

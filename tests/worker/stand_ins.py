"""Stand-ins for the engine's state, for tests of what is done with its bytes."""

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from sqlalchemy import Connection

from storage import leases
from storage.clock import FrozenClock
from storage.leases import Lease
from storage.runs import Run
from tests.factories import make_run
from worker.active_run import ActiveRun
from worker.engine.run_state import Staging, StateCopy
from worker.engine.timing import DeviceClock
from worker.work_meter import WorkMeter


def make_meter(worker_id: str = "w") -> WorkMeter:
    """A meter of a worker on the CPU."""
    return WorkMeter(worker_id, DeviceClock(torch.device("cpu")))


@dataclass
class StateStandIn:
    """Hands out bytes that name what was asked for."""

    content: bytes = b"state"
    asked: list[str] = field(default_factory=list)

    def copy(self, staging: Staging) -> StateCopy:
        """A snapshot."""
        self.asked.append("snapshot")
        return StateCopy({}, {"snapshot of": self.content.decode()})

    def checkpoint_bytes(self) -> bytes:
        """Adapter and optimizer state."""
        self.asked.append("checkpoint")
        return b"checkpoint of " + self.content

    def sampler_files(self) -> dict[str, bytes]:
        """The adapter in PEFT's form."""
        self.asked.append("adapter")
        return {"adapter_config.json": b"{}", "adapter_model.safetensors": b"adapter of " + self.content}


def hold_run(tx: Connection, clock: FrozenClock, worker_id: str = "w") -> tuple[Run, Lease]:
    """A new run and a worker's lease on it."""
    run = make_run(tx)
    expires_at = clock.now() + timedelta(seconds=10)
    return run, leases.acquire(tx, run.id, worker_id=worker_id, now=clock.now(), expires_at=expires_at)


def make_active_run(run: Run, lease: Lease, *, state_seq: int = 3, snapshot_seq: int = -1, **changes: Any) -> ActiveRun:
    """A run in memory with nothing left to do, its state newer than its snapshot."""
    values: dict[str, Any] = {"model": None, "state": StateStandIn(), "may_have_more": False, **changes}
    return ActiveRun(run, lease, state_seq=state_seq, snapshot_seq=snapshot_seq, **values)

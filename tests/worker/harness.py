"""A worker's engine in this process: real engine, SQLite and a directory, but no broker and no other process."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from jobs import operations
from jobs.backlog import Backlog
from jobs.operations import Body, Failure, Kind, LoraConfig, Outcome
from jobs.settings import JobsSettings
from jobs.submit import Submitter
from storage import accounts, base_models, journal, leases, runs
from storage.base_models import BaseModel, StoredFile
from storage.migrate import migrate
from storage.open import Storage, open_storage
from storage.runs import Run, Session
from storage.settings import StorageSettings
from tests.announcements import Announcements
from worker import takeover
from worker.commit import Committer
from worker.engine.timing import DeviceClock
from worker.loop import EngineLoop
from worker.residency import BaseModels
from worker.sample_turn import SampleTurn
from worker.settings import WorkerSettings
from worker.train_turn import TrainTurn
from worker.work_meter import WorkMeter

MODEL = "tiny"
WAIT_S = 180.0


class Service:
    """What clients and workers share: rows, objects, one account, one session, one base model."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory = directory
        self.storage: Storage = open_storage(StorageSettings(data_dir=directory, inline_bytes_max=2048))
        migrate(self.storage.database)
        self.announced = Announcements()
        self.submitter = Submitter(self.storage, self.announced, Backlog.of(self.storage.database, JobsSettings()))
        self.session = self._make_session()
        self._add_model(model)
        self._num_runs = 0

    def create_run(self, *, rank: int = 4, seed: int = 1) -> Run:
        """A run whose operation 0 is accepted."""
        accepted = self.submitter.create_model(
            self.session, model_seq_id=self._num_runs, base_model=MODEL, lora=LoraConfig(rank=rank, seed=seed)
        )
        self._num_runs += 1
        with self.storage.database.read() as tx:
            return runs.get_run(tx, str(accepted.run_id))

    def submit(self, run: Run, seq: int, body: Body | Failure, *, kind: Kind | None = None) -> str:
        """Accept an operation."""
        if kind is None:
            assert not isinstance(body, Failure)
            kind = body.kind
        return self.submitter.training(run, seq, body, kind=kind).request_id

    def status(self, request_id: str) -> str:
        """Where an operation stands."""
        with self.storage.database.read() as tx:
            return journal.get_operation(tx, request_id).status

    def outcome(self, request_id: str) -> Outcome:
        """The outcome, waited for."""
        deadline = time.monotonic() + WAIT_S
        while True:
            with self.storage.database.read() as tx:
                operation = journal.get_operation(tx, request_id)
            if operation.status == journal.Status.FAILED:
                return Failure(str(operation.error), operations.Category(str(operation.error_category)))
            if operation.status == journal.Status.COMPLETED:
                found: Outcome = operations.decode(self.storage.payloads.get(operation.outcome))
                return found
            assert time.monotonic() < deadline, f"{request_id} is {operation.status} after {WAIT_S} s"
            time.sleep(0.005)

    def encoded(self, request_ids: Sequence[str]) -> list[bytes]:
        """Outcomes as they are on record, to be compared bit for bit."""
        return [operations.encode(self.outcome(request_id)) for request_id in request_ids]

    def _make_session(self) -> Session:
        with self.storage.database.begin() as tx:
            now = self.storage.database.now(tx)
            account = accounts.create_account(tx, "tests", now=now)
            return runs.create_session(tx, account_id=account.id, api_key_id=None, now=now, sdk_version="tests")

    def _add_model(self, directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        files = {}
        for path in directory.iterdir():
            key = f"base_models/tiny/0000000000000000/{path.name}"
            self.storage.payloads.put_object(path.read_bytes(), key)
            files[path.name] = StoredFile(key, path.stat().st_size)
        with self.storage.database.begin() as tx:
            model = BaseModel(
                name=MODEL,
                source=str(directory),
                tokenizer_id=str(directory),
                architecture="Qwen3ForCausalLM",
                dtype="float32",
                context_length=config["max_position_embeddings"],
                vocab_size=config["vocab_size"],
                num_parameters=1,
                tied_embeddings=False,
                files=files,
                created_at=self.storage.database.now(tx),
            )
            base_models.add_base_model(tx, model)


class Engine:
    """One worker's engine thread."""

    def __init__(self, service: Service, name: str, *, published: list[str] | None = None, **settings: Any) -> None:
        self.name = name
        self.settings = WorkerSettings(**{"cache_dir": service.directory / "cache", "writeback_s": 0.0, **settings})
        self.published: list[str] = [] if published is None else published
        self._service = service
        self._io = ThreadPoolExecutor(4)
        storage = service.storage
        self.models = BaseModels(storage, self.settings, torch.device("cpu"))
        meter = WorkMeter(name, DeviceClock(torch.device("cpu")))
        committer = Committer(storage, meter, worker_id=name, publish=self.published.extend)
        train = TrainTurn(storage, committer, meter, self._io, worker_id=name, device="cpu")
        samples = SampleTurn(committer, meter, worker_id=name, device="cpu")
        self.loop = EngineLoop(storage, self.settings, train, samples, meter, worker_id=name, on_room=lambda: None)

    def start(self) -> Engine:
        """Start the thread."""
        self.loop.start()
        return self

    def take(self, run: Run) -> None:
        """Take a run over, as the task of a message does."""
        if self.loop.roster.notify(run.id):
            return
        storage = self._service.storage
        fresh, lease = takeover.acquire(storage, run.id, worker_id=self.name, lease_s=self.settings.lease_s)
        self.loop.roster.expect(fresh, lease)
        self.loop.roster.arrive(takeover.fetch(storage, self.models, fresh, lease, in_use=()))

    def leave(self) -> None:
        """Drain and hand over, as on SIGTERM."""
        self.loop.drain()
        self.loop.join()
        with self._service.storage.database.begin() as tx:
            leases.release_worker(tx, self.name)
        self._io.shutdown()

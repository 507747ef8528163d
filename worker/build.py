"""settings → database, store, engine, loop: everything a worker is made of, joined once."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import structlog
import torch
from celery import Celery

from jobs.app import make_app
from jobs.dispatch import Dispatcher
from jobs.results import OutcomePublisher
from jobs.settings import JobsSettings
from storage import deaths, ids, workers
from storage.database import Database
from storage.deaths import Cause
from storage.open import Storage, open_storage
from storage.retry import retrying
from worker import tasks
from worker.commit import Committer
from worker.engine.timing import DeviceClock
from worker.intake import RunIntake
from worker.keeper import Keeper
from worker.loop import EngineLoop
from worker.residency import BaseModels, SamplingAdapters
from worker.sample_feeder import SampleFeeder
from worker.sample_turn import SampleTurn
from worker.settings import WorkerSettings
from worker.train_turn import TrainTurn
from worker.watchdog import Watchdog
from worker.work_meter import WorkMeter

log = structlog.get_logger()

IO_THREADS = 8
SAMPLING_ADAPTERS_MAX = 32


@dataclass(frozen=True)
class Worker:
    """One worker process's parts."""

    id: str
    app: Celery
    storage: Storage
    engine: EngineLoop
    feeder: SampleFeeder
    keeper: Keeper
    watchdog: Watchdog
    dispatcher: Dispatcher
    publisher: OutcomePublisher
    io: ThreadPoolExecutor

    def start(self) -> None:
        """Start the threads that compute."""
        self.engine.start()
        self.feeder.start()
        self.keeper.start()
        self.watchdog.start()

    def leave(self) -> None:
        """Claim nothing more and begin no further turn; tasks that wait for the engine end at once."""
        self.feeder.stop()
        self.engine.drain()

    def stop(self) -> None:
        """Finish the turn under way, write back, hand over."""
        self.leave()
        self.engine.join()
        self.keeper.stop()
        self.watchdog.stop()
        let_go(self.storage.database, self.dispatcher, self.id, Cause.STOPPED)
        self.publisher.close()
        self.io.shutdown(wait=False, cancel_futures=True)
        self.storage.close()


def let_go(database: Database, dispatcher: Dispatcher, worker_id: str, cause: Cause) -> None:
    """Note how a worker ends, and announce what it held."""
    with database.begin() as tx:
        freed = deaths.note_death(tx, worker_id, cause, now=database.now(tx))
    for run_id in freed.runs:
        dispatcher.announce_run(run_id)
    dispatcher.announce_samples()


def build_worker(settings: WorkerSettings, jobs_settings: JobsSettings) -> Worker:
    """Join a worker; nothing runs yet, but it is registered."""
    worker_id = settings.worker_id or f"{socket.gethostname()}-{os.getpid()}-{ids.new_token()[:8]}"
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    device_name = name_device(device)
    storage = open_storage()
    app = make_app(jobs_settings)
    publisher = OutcomePublisher(jobs_settings.resolved_broker_url())
    io = ThreadPoolExecutor(IO_THREADS, thread_name_prefix="io")
    models = BaseModels(storage, settings, device)
    meter = WorkMeter(worker_id, DeviceClock(device))
    committer = Committer(storage, meter, worker_id=worker_id, publish=publisher.publish)
    samples = SampleTurn(committer, meter, worker_id=worker_id, device=device_name)
    train = TrainTurn(storage, committer, meter, io, worker_id=worker_id, device=device_name)
    engine = EngineLoop(
        storage,
        settings,
        train,
        samples,
        meter,
        worker_id=worker_id,
        on_room=lambda: feeder.notify(),  # noqa: PLW0108 - made just below
    )
    feeder = SampleFeeder(
        storage,
        models,
        SamplingAdapters(storage, num_max=SAMPLING_ADAPTERS_MAX),
        samples,
        worker_id=worker_id,
        claim_s=settings.lease_s,
        samples_max=settings.samples_max,
        in_use=engine.models_in_use,
    )
    dispatcher = Dispatcher(app, storage.database, message_expires_s=jobs_settings.message_expires_s)
    intake = RunIntake(storage, engine, models, dispatcher, settings, worker_id=worker_id)
    tasks.register(
        app,
        storage=storage,
        intake=intake,
        feeder=feeder,
        dispatcher=dispatcher,
        settings=jobs_settings,
        slice_s=settings.slice_s,
    )
    retrying(partial(_register, storage.database, worker_id, device_name))
    watchdog = Watchdog(engine, settings, confess=partial(let_go, storage.database, dispatcher, worker_id))
    return Worker(
        worker_id, app, storage, engine, feeder, Keeper(engine, settings), watchdog, dispatcher, publisher, io
    )


def _register(database: Database, worker_id: str, device_name: str) -> None:
    with database.begin() as tx:
        now = database.now(tx)
        deaths.note_death(tx, worker_id, Cause.UNKNOWN, now=now)  # one of this name may have died unseen
        workers.register(
            tx, worker_id=worker_id, host=socket.gethostname(), pid=os.getpid(), device=device_name, now=now
        )


def choose_device(name: str) -> torch.device:
    """The device of the settings.

    Raises:
        ValueError: there is no such device here; names what there is.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {name!r} here: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def name_device(device: torch.device) -> str:
    """The device class on usage records and rate cards."""
    return "cpu" if device.type == "cpu" else f"cuda:{torch.cuda.get_device_name(device)}"

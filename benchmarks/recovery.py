"""Recovery: SIGKILL to the worker of a real service at random moments, until the next operation is completed.

A client trains without a pause, several steps pipelined. Deaths beside a fork server and deaths without one (it is
killed just before) come in turns, so that both see the same machine. Times are those of log lines, and of the first
usage record by another worker.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tinker
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sqlalchemy import func, select
from tinker import types

from api.cli.child import SETTLED_S
from benchmarks.conditions import OthersLoad, describe, table
from benchmarks.durability import write_model
from benchmarks.gpu.arguments import SIZES
from storage import billing_tables, tables
from tests.chaos.servers import Servers
from tests.setups.deployment import MODEL, Deployment, find_name
from worker.forkserver import FORKSERVER_NAME
from worker.starter.make import ensure_starter_model

PATIENCE_S = 600.0
LOOK_S = 0.02
NUM_PIPELINED = 4
WARM, COLD = "forked", "cold start"


@dataclass(frozen=True)
class Recovery:
    """One death: seconds of each part, in order, and the CPU share of other programs meanwhile.

    Attributes:
        detection: SIGKILL until the dead worker's leases are free.
        start: until the next worker takes messages.
        load: until base model, snapshot and tail are in its memory.
        replay: until the state is the committed one.
        rest: until the next operation is committed.
        num_replayed: operations of the tail.
    """

    detection: float
    start: float
    load: float
    replay: float
    rest: float
    num_replayed: int
    others: float

    @property
    def whole(self) -> float:
        """SIGKILL until the next operation is committed."""
        return self.detection + self.start + self.load + self.replay + self.rest


PARTS: Mapping[str, Callable[[Recovery], float]] = {
    "detection": lambda one: one.detection,
    "load: process": lambda one: one.start,
    "load: model and state": lambda one: one.load,
    "replay": lambda one: one.replay,
    "rest": lambda one: one.rest,
    "whole": lambda one: one.whole,
}


class Client(threading.Thread):
    """Trains until told to stop, with some steps on their way at any time."""

    def __init__(self, deployment: Deployment, arguments: argparse.Namespace) -> None:
        super().__init__(daemon=True)
        self._deployment = deployment
        self._arguments = arguments
        self._stopping = threading.Event()
        self.num_steps = 0

    def run(self) -> None:
        """Train."""
        with tinker.ServiceClient(base_url=self._deployment.url, api_key=self._deployment.api_key) as client:
            training = client.create_lora_training_client(MODEL, rank=self._arguments.rank, seed=1).result()
            on_their_way: deque[Any] = deque()
            while not self._stopping.is_set():
                on_their_way.append(training.forward_backward(self._data(), "cross_entropy"))
                on_their_way.append(training.optim_step(types.AdamParams(learning_rate=1e-4)))
                while len(on_their_way) > 2 * NUM_PIPELINED:
                    on_their_way.popleft().result()
                    on_their_way.popleft().result()
                    self.num_steps += 1
            for future in on_their_way:
                future.result()

    def stop(self) -> None:
        """End, once everything submitted is done."""
        self._stopping.set()
        self.join(PATIENCE_S)
        assert not self.is_alive(), "the client waits for ever"

    def _data(self) -> list[types.Datum]:
        numbers = np.random.RandomState(0)
        length = self._arguments.length
        rows = [numbers.randint(3, 300, length + 1).tolist() for _ in range(self._arguments.datums)]
        return [
            types.Datum(
                model_input=types.ModelInput.from_ints(row[:-1]),
                loss_fn_inputs={
                    "target_tokens": types.TensorData(data=row[1:], dtype="int64", shape=[length]),
                    "weights": types.TensorData(data=[1.0] * length, dtype="float32", shape=[length]),
                },
            )
            for row in rows
        ]


def recover(deployment: Deployment, client: Client, *, warm: bool, after_s: float) -> Recovery:
    """Kill the worker once, some time after everything has settled, and wait until work goes on."""
    _wait(lambda: deployment.pids("worker"), "a worker", deployment)
    (pid,) = deployment.pids("worker")
    _wait(lambda: _forkserver(deployment, pid), "a fork server that has loaded", deployment)
    _wait(lambda: time.time() - psutil.Process(pid).create_time() > SETTLED_S, "a settled worker", deployment)
    settled = client.num_steps
    _wait(lambda: client.num_steps > settled, "progress", deployment)
    time.sleep(after_s)
    if not warm:
        server = _forkserver(deployment, pid)
        assert server is not None
        server.kill()
    load = OthersLoad()
    killed_at = time.time()
    os.kill(pid, signal.SIGKILL)
    _wait(lambda: _first_done(deployment, killed_at, pid), "the next operation", deployment)
    return _read(deployment, killed_at, pid, load.share())


def _read(deployment: Deployment, killed_at: float, pid: int, others: float) -> Recovery:
    """What the logs and the usage records say about a death."""
    dead = _worker_id(deployment, pid)

    def first(event: str, **fields: object) -> dict[str, Any]:
        found = [one for one in deployment.events(event, **fields) if _at(one) >= killed_at]
        assert found, f"no {event} since the kill:\n{deployment.log()[-3000:]}"
        return min(found, key=_at)

    done_at = _first_done(deployment, killed_at, pid)
    assert done_at is not None
    fetched = first("run_fetched")
    replayed = deployment.events("replayed", run=fetched["run"])
    times = [
        killed_at,
        _at(first("worker_freed", worker=dead)),
        _at(first("worker_ready", worker=fetched["worker"])),
        _at(fetched),
        _at(first("run_ready", run=fetched["run"])),
        done_at,
    ]
    num_replayed = max((one["operations"] for one in replayed if _at(one) >= killed_at), default=0)
    ordered = list(np.maximum.accumulate(times))  # a warm worker may take messages before the leases are free
    parts = [float(after - before) for before, after in pairwise(ordered)]
    return Recovery(*parts, num_replayed=num_replayed, others=others)


def _first_done(deployment: Deployment, killed_at: float, pid: int) -> float | None:
    """When another worker than that of a pid first completed an operation."""
    record = billing_tables.usage_record.c
    since = datetime.fromtimestamp(killed_at, UTC)
    query = select(func.min(record.finished_at)).where(
        record.finished_at > since, record.worker_id != _worker_id(deployment, pid)
    )
    with deployment.storage() as storage, storage.database.read() as tx:
        found = tx.execute(query).scalar_one()
    return None if found is None else float(found.timestamp())


def _worker_id(deployment: Deployment, pid: int) -> str:
    worker = tables.worker.c
    newest = select(worker.id).where(worker.pid == pid).order_by(worker.started_at.desc()).limit(1)
    with deployment.storage() as storage, storage.database.read() as tx:
        return str(tx.execute(newest).scalar_one())


def _forkserver(deployment: Deployment, pid: int) -> psutil.Process | None:
    """The one beside a worker, once it has loaded."""
    ready = {event["pid"] for event in deployment.events("child_ready", child="forkserver")}
    siblings = psutil.Process(pid).parent().children()
    return next((one for one in siblings if find_name(one) == FORKSERVER_NAME and one.pid in ready), None)


def _at(event: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(event["timestamp"]).timestamp()


def _wait(holds: Callable[[], object], what: str, deployment: Deployment) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S} s\n{deployment.log()[-3000:]}"
        time.sleep(LOOK_S)


def report(arguments: argparse.Namespace, found: Mapping[str, list[Recovery]], client: Client) -> None:
    """Print the table."""
    found = {name: side for name, side in found.items() if side}
    every = [one for side in found.values() for one in side]
    others = statistics.median(one.others for one in every)
    replayed = statistics.median(one.num_replayed for one in every)
    print(f"\n{describe()};")
    print(f"{arguments.setup}, model {arguments.model}, rank {arguments.rank}, {arguments.datums}×{arguments.length}")
    print(f"tokens a step, {NUM_PIPELINED} steps pipelined; {len(every)} deaths, seed {arguments.seed};")
    print(f"median of {replayed:.0f} operations replayed; other programs used {others:.0%} of the CPUs (median)\n")
    sides = [(side, share) for side in found.values() for share in (50, 95)]
    rows = [(part, *(_percentile(side, of, share) for side, share in sides)) for part, of in PARTS.items()]
    print(table(("seconds", *(f"{name}, {share}" for name in found for share in ("p50", "p95"))), rows))
    print(f"\n{client.num_steps} steps of training were completed.")


def _percentile(side: list[Recovery], of: Callable[[Recovery], float], share: int) -> str:
    return f"{np.percentile([of(one) for one in side], share):.2f}"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", choices=("embedded", "rabbitmq", "valkey"), default="embedded", help="or the broker")
    parser.add_argument("--model", choices=("starter", *SIZES), default="starter", help="or a random one of a size")
    parser.add_argument("--kills", type=int, default=20, help="half of them beside a fork server")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--pause-max-s", type=float, default=3.0, help="longest time from being settled to the kill")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--datums", type=int, default=8, help="of one forward_backward")
    parser.add_argument("--length", type=int, default=128, help="tokens of a datum")
    return parser.parse_args()


@contextlib.contextmanager
def deployed(arguments: argparse.Namespace, directory: Path) -> Iterator[Deployment]:
    """The service, on the set-up that was asked for."""
    is_starter = arguments.model == "starter"
    model = ensure_starter_model() if is_starter else write_model(arguments.model, directory / "model")
    servers = None if arguments.setup == "embedded" else Servers(arguments.setup)
    (directory / "service").mkdir()
    deployment = Deployment(directory / "service", model, servers.direct_urls if servers else None)
    try:
        yield deployment
    finally:
        deployment.close()
        if servers is not None:
            servers.close()


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    moments = random.Random(arguments.seed)
    found: dict[str, list[Recovery]] = {WARM: [], COLD: []}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as name, deployed(arguments, Path(name)) as deployment:
        client = Client(deployment, arguments)
        client.start()
        # Ctrl-C ends it early, with the figures that there are.
        with contextlib.suppress(KeyboardInterrupt), Progress(*columns) as progress:
            bar = progress.add_task("deaths", total=arguments.kills)
            for number in range(arguments.kills):
                side = (WARM, COLD)[number % 2]
                after_s = moments.uniform(0.0, arguments.pause_max_s)
                found[side].append(recover(deployment, client, warm=side == WARM, after_s=after_s))
                progress.update(bar, advance=1, description=f"{side}: {found[side][-1].whole:.1f} s")
        if any(found.values()):
            report(arguments, found, client)
        client.stop()


if __name__ == "__main__":
    main()

"""Time of a run state's save and load against the object store's own put and get of the same bytes.

A save is what write-back does: copy the state, encode, hash, announce, put, name. A load is what a takeover does: get,
verify, decode into a run state. The store alone is asked for `put` and `get` of the same bytes, in turns with them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.conditions import OthersLoad, describe, table
from benchmarks.gpu.arguments import SIZES
from benchmarks.gpu.models import make_sized_model, make_state
from jobs.operations import LoraConfig
from storage import keys, leases, runs, snapshots
from storage.leases import Lease
from storage.migrate import migrate
from storage.object_url import open_object_store
from storage.open import Storage, open_storage
from storage.payloads import PayloadStore
from storage.settings import StorageSettings
from storage.sweeper import sweep
from tests.factories import make_run
from worker.engine.base_model import BaseModel
from worker.engine.run_state import RunState, Staging
from worker.writeback import write_snapshot

AGES_S = 1e9


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="of the random model")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--repeats", type=int, default=15, help="of each, in turns, after two to warm up")
    parser.add_argument(
        "--stores", nargs="+", default=["directory", "s3"], help="directory, or s3: a server of the tests"
    )
    parser.add_argument("--object-store-url", help="of another store, measured besides")
    parser.add_argument("--directory", type=Path, help="where database and objects go; default: a temporary one")
    return parser.parse_args()


@contextmanager
def opened(kind: str, directory: Path) -> Iterator[Storage]:
    """A database in a directory, and the store that is measured."""
    storage = open_storage(StorageSettings(data_dir=directory / kind.partition(":")[0]))
    migrate(storage.database)
    try:
        if kind == "directory":
            yield storage
        elif kind == "s3":
            from tests.servers.ceph import CephServer

            with closing(CephServer()) as server:
                yield _on(storage, server.create_bucket())
        else:
            yield _on(storage, kind)
    finally:
        storage.close()


def _on(storage: Storage, url: str) -> Storage:
    settings, objects = storage.settings, open_object_store(url)
    payloads = PayloadStore(
        storage.database,
        objects,
        inline_bytes_max=settings.inline_bytes_max,
        upload_expiry_s=settings.upload_expiry_s,
    )
    return replace(storage, objects=objects, payloads=payloads)


class Subject:
    """A trained state with accumulated gradients, the largest there is, and a run that it belongs to."""

    def __init__(self, storage: Storage, base_model: BaseModel, rank: int) -> None:
        self._storage = storage
        self._base_model = base_model
        self._lora = LoraConfig(rank=rank, seed=1)
        self._state = make_state(base_model, self._lora)
        self._state.step = self._state.num_accumulated = 1
        self._staging = Staging()
        self._seq = 0
        with storage.database.begin() as tx:
            now = storage.database.now(tx)
            run = make_run(tx)
            self._lease: Lease = leases.acquire(
                tx, run.id, worker_id="benchmark", now=now, expires_at=storage.database.after(tx, 3600)
            )
            self._run = runs.get_run(tx, run.id)
        self.file = b"".join(self._state.copy(self._staging).pieces())

    def save(self) -> None:
        """Write back."""
        self._seq += 1
        write_snapshot(self._storage, self._lease, self._seq, self._state.copy(self._staging))

    def load(self) -> None:
        """Fetch the newest snapshot."""
        with self._storage.database.read() as tx:
            newest = snapshots.newest_first(tx, self._run.id)[0]
        with closing(snapshots.read(self._storage.objects, newest)) as chunks:
            RunState.deserialize(self._base_model, self._lora, chunks)

    def put(self) -> None:
        """The same bytes, the store alone."""
        self._key = keys.snapshot_key(self._run.id, self._seq)
        self._storage.objects.put(self._key, self.file)

    def get(self) -> None:
        """What `put` has stored."""
        self._storage.objects.get(self._key)

    def copy(self) -> None:
        """The part of a save that the engine waits for."""
        self._state.copy(self._staging)

    def delete(self) -> None:
        """Let go what is not needed any more, so that the store does not fill up."""
        storage = self._storage
        storage.objects.delete([self._key])
        sweep(
            storage.database, storage.objects, result_retention_s=AGES_S, sampling_session_idle_s=AGES_S, pass_s=AGES_S
        )


@dataclass(frozen=True)
class Taken:
    """Wall time, and CPU time of this process."""

    wall_s: float
    cpu_s: float


def taken_by(work: Callable[[], None]) -> Taken:
    """What a call takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Taken(time.perf_counter() - wall, time.process_time() - cpu)


def measure(kind: str, subject: Subject, repeats: int) -> list[tuple[str, ...]]:
    """Rows of one store."""
    taken: dict[str, list[Taken]] = {name: [] for name in ("put", "save", "copy", "get", "load")}
    others = OthersLoad()
    for number in range(repeats + 2):
        for name in (("put", "save"), ("save", "put"))[number % 2]:
            taken[name].append(taken_by(getattr(subject, name)))
        for name in (("get", "load"), ("load", "get"))[number % 2]:
            taken[name].append(taken_by(getattr(subject, name)))
        taken["copy"].append(taken_by(subject.copy))
        subject.delete()
        print(f"{kind}: {number + 1}/{repeats + 2}", end="\r", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    kept = {name: values[2:] for name, values in taken.items()}

    def ms(name: str, field: str) -> float:
        return statistics.median(getattr(one, field) for one in kept[name]) * 1e3

    mib = len(subject.file) / 2**20
    rows: list[tuple[str, ...]] = []
    for ours, theirs in (("save", "put"), ("load", "get")):
        ratio = statistics.median(a.wall_s / b.wall_s for a, b in zip(kept[theirs], kept[ours], strict=True))
        speeds = (f"{mib * 1e3 / ms(name, 'wall_s'):.0f}" for name in (ours, theirs))
        cpu = (f"{ms(name, 'cpu_s'):.0f}" for name in (ours, theirs))
        waits = f"{ms('copy', 'cpu_s'):.1f}" if ours == "save" else ""
        rows.append((kind, f"{ours} / {theirs}", *speeds, f"{ratio:.2f}", *cpu, waits, f"{others.share():.0%}"))
    return rows


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    model = make_sized_model(arguments.size, torch.device("cpu"), torch.float32)
    base_model = BaseModel(model, name=arguments.size)
    rows: list[tuple[str, ...]] = []
    size_bytes = 0
    kinds = [*arguments.stores, *([arguments.object_store_url] if arguments.object_store_url else [])]
    for kind in kinds:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as name, opened(kind, Path(name)) as storage:
            subject = Subject(storage, base_model, arguments.rank)
            size_bytes = len(subject.file)
            rows += measure("other" if "://" in kind else kind, subject, arguments.repeats)
    print(f"\n{describe()}; {arguments.size}, rank {arguments.rank}: a state of {size_bytes / 2**20:.1f} MiB; ")
    print(f"medians of {arguments.repeats} repeats in turns, the ratio that of neighbours\n")
    header = (
        "store",
        "",
        "MiB/s",
        "of the store",
        "ratio",
        "CPU ms",
        "of the store",
        "engine's ms",
        "CPU used by others",
    )
    print(table(header, rows))


if __name__ == "__main__":
    main()

"""The price of durability: training with journal, commits and write-back against the same passes with none of it.

Both sides run in one process on one model in memory, in turns, block by block. The bare side computes the same
operations with the same engine (`Trainer.run`, `optim_step`) and keeps the outcomes in memory; the durable side takes
them from the journal, commits each turn, and writes snapshots back. Accepting operations is not measured: that is the
api's work, in another process.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.conditions import OthersLoad, describe, table
from benchmarks.gpu.arguments import SIZES
from benchmarks.gpu.models import make_operation, make_sized_model
from jobs.operations import Failure, ForwardBackward, LoraConfig, OptimStep
from storage.runs import Run
from tests.tiny_model import make_tokenizer
from tests.worker.harness import MODEL, Engine, Service
from worker.engine.optimizer import optim_step
from worker.engine.run_state import RunState
from worker.engine.trainer import TrainRequest
from worker.residency import ResidentModel

PATIENCE_S = 600.0


@dataclass(frozen=True)
class Block:
    """Some steps of one side.

    Attributes:
        wall_s: from the first step's begin to the last one's end.
        cpu_s: of the process, its threads that write back included.
        others: share of the machine that other processes used.
    """

    wall_s: float
    cpu_s: float
    others: float


class Clock:
    """Measures a block."""

    def __enter__(self) -> Clock:
        gc.collect()
        self._others, self._wall, self._cpu = OthersLoad(), time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self.block = Block(wall, cpu, self._others.share())


class Bare:
    """A run that lives in memory alone."""

    def __init__(self, model: ResidentModel, rank: int) -> None:
        self._model = model
        self._state = RunState.create(model.base, LoraConfig(rank=rank, seed=1))
        self._thread = ThreadPoolExecutor(1)
        self.outcomes: list[Any] = []

    def block(self, body: ForwardBackward, steps: int) -> Block:
        """Train, on a thread of its own as the engine has: threads differ in how they get their memory."""
        return self._thread.submit(self._block, body, steps).result()

    def _block(self, body: ForwardBackward, steps: int) -> Block:
        with Clock() as clock:
            for _ in range(steps):
                report = self._model.trainer.run([TrainRequest(self._state, body)])
                self.outcomes += [*report.outcomes, optim_step(self._state, OptimStep(learning_rate=1e-4))]
        assert not any(isinstance(outcome, Failure) for outcome in self.outcomes), self.outcomes[-2:]
        self.outcomes.clear()
        return clock.block


class Outcomes(list[str]):
    """Request ids whose outcomes the engine has committed."""

    def __init__(self) -> None:
        super().__init__()
        self._grown = threading.Condition()

    def extend(self, request_ids: Iterable[str]) -> None:
        """The engine says so."""
        with self._grown:
            super().extend(request_ids)
            self._grown.notify_all()

    def wait_for(self, request_id: str) -> None:
        """Return when the last of a block is done."""
        with self._grown:
            assert self._grown.wait_for(lambda: self[-1:] == [request_id], PATIENCE_S), f"{request_id} is not done"


class Durable:
    """A run of a worker's engine."""

    def __init__(self, service: Service, engine: Engine, outcomes: Outcomes, rank: int) -> None:
        self._service = service
        self._outcomes = outcomes
        self._engine = engine
        self._run: Run = service.create_run(rank=rank, seed=1)
        self._seq = 1
        self.bytes_by_kind: dict[str, int] = {}
        self._count_uploads()

    def block(self, body: ForwardBackward, steps: int) -> Block:
        """Train what has been submitted before the clock starts; uploads in flight at its end are waited for after."""
        for _ in range(steps):
            self._service.submit(self._run, self._seq, body)
            last = self._service.submit(self._run, self._seq + 1, OptimStep(learning_rate=1e-4))
            self._seq += 2
        with Clock() as clock:
            self._engine.take(self._run)
            self._outcomes.wait_for(last)
        self._engine.loop.wait_idle(self._run.id, timeout_s=PATIENCE_S)
        self._wait_written_back()
        return clock.block

    def _wait_written_back(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while any(run.is_dirty or run.writing for run in self._engine.loop.roster.active()):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def _count_uploads(self) -> None:
        objects = self._service.storage.objects
        put = objects.put

        def counted(key: str, data: Any, *, size_bytes: int | None = None) -> None:
            kind = key.partition("/")[0]
            size = len(data) if size_bytes is None else size_bytes
            self.bytes_by_kind[kind] = self.bytes_by_kind.get(kind, 0) + size
            put(key, data, size_bytes=size_bytes)

        objects.put = counted  # type: ignore[method-assign]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the model; small has 81.8 M parameters")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--datums", type=int, default=16, help="of one forward_backward")
    parser.add_argument("--length", type=int, default=256, help="tokens of a datum")
    parser.add_argument("--steps", type=int, default=8, help="of one block: forward_backward and optim_step each")
    parser.add_argument("--blocks", type=int, default=7, help="of either side, in turns, after one to warm up")
    parser.add_argument("--writeback-s", type=float, default=1.0, help="PIECEWORK_WRITEBACK_S")
    parser.add_argument("--others-most", type=float, default=0.15, help="CPU share from which a pair is left out")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--directory", type=Path, help="where objects and database go; default: a temporary one")
    return parser.parse_args()


def write_model(size: str, directory: Path) -> Path:
    """A random model of a size, in a directory as the hub would give it."""
    make_tokenizer().save_pretrained(directory)
    make_sized_model(size, torch.device("cpu"), torch.float32).save_pretrained(directory)
    return directory


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        service = Service(directory / "data", write_model(arguments.size, directory / "model"))
        tokens_max = max(4096, arguments.datums * arguments.length)
        durable_settings = {"writeback_s": arguments.writeback_s, "tokens_max": tokens_max, "warm_s": 3600.0}
        outcomes = Outcomes()
        engine = Engine(service, "benchmark", published=outcomes, **durable_settings).start()
        try:
            measure(arguments, service, engine, outcomes)
        finally:
            engine.leave()
            service.storage.close()


def measure(arguments: argparse.Namespace, service: Service, engine: Engine, outcomes: Outcomes) -> None:
    """Blocks in turns, and the table."""
    model = engine.models.get(MODEL, in_use=())
    lengths = (arguments.length,) * arguments.datums
    body = make_operation(lengths, vocab_size=model.base.vocab_size, seed=1)
    bare, durable = Bare(model, arguments.rank), Durable(service, engine, outcomes, arguments.rank)
    pairs: list[tuple[Block, Block]] = []
    for number in range(arguments.blocks + 1):
        order = (bare, durable) if number % 2 else (durable, bare)
        blocks = {id(side): side.block(body, arguments.steps) for side in order}
        pair = blocks[id(bare)], blocks[id(durable)]
        if number == 0:
            durable.bytes_by_kind.clear()
            continue
        pairs.append(pair)
        others = max(block.others for block in pair)
        progress = f"{number}/{arguments.blocks}: ratio {pair[0].wall_s / pair[1].wall_s:.3f}, others {others:.0%}"
        print(progress, file=sys.stderr, flush=True)
    report(arguments, pairs, durable.bytes_by_kind)


def report(arguments: argparse.Namespace, pairs: list[tuple[Block, Block]], uploads: dict[str, int]) -> None:
    """Print the tables."""
    quiet = [pair for pair in pairs if max(block.others for block in pair) <= arguments.others_most]
    used = quiet or pairs
    tokens = arguments.steps * arguments.datums * arguments.length
    steps = arguments.blocks * arguments.steps

    def median(side: int, name: str) -> float:
        return statistics.median(getattr(pair[side], name) for pair in used)

    print(f"\n{describe()}; {arguments.size}, rank {arguments.rank},")
    print(f"{arguments.datums}×{arguments.length} tokens a step, {arguments.steps} steps a block, write-back at least")
    print(f"{arguments.writeback_s} s apart; {len(used)} of {len(pairs)} pairs ({len(quiet)} while others used at most")
    print(f"{arguments.others_most:.0%} of the CPUs)\n")
    rows = [
        (
            name,
            f"{tokens / median(side, 'wall_s'):.0f}",
            f"{median(side, 'wall_s') / arguments.steps * 1e3:.1f}",
            f"{median(side, 'cpu_s') / arguments.steps * 1e3:.1f}",
            f"{median(side, 'others'):.0%}",
        )
        for side, name in enumerate(("in memory", "durable"))
    ]
    print(table(("", "tokens/s", "ms a step", "CPU ms a step", "CPU used by others"), rows))
    ratios = sorted(bare.wall_s / durable.wall_s for bare, durable in used)
    cpu = statistics.median(bare.cpu_s / durable.cpu_s for bare, durable in used)
    print(f"\nratio of pairs: median {statistics.median(ratios):.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}")
    print(f"ratio of CPU time: median {cpu:.3f}\n")
    volume = [(kind, f"{size / 2**20 / steps:.2f}") for kind, size in sorted(uploads.items())]
    print(table(("uploaded by the worker and the submission", "MiB a step"), volume))


if __name__ == "__main__":
    main()

"""The clients: one process per script, and what they have recorded so far."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.scripts import ROUNDS

LOOK_S = 0.05


class ClientsStuckError(Exception):
    """The clients get no results any more, or one of them ended."""


@dataclass
class Record:
    """What one script got: per round its values in order, and when each came (seconds since 1970)."""

    rounds: Mapping[int, Sequence[Any]] = field(default_factory=dict)
    done: frozenset[int] = frozenset()
    times: Sequence[float] = ()

    @property
    def longest_pause_s(self) -> float:
        """The longest time without a result."""
        return max((later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)), default=0.0)


class Clients:
    """Script processes that repeat their rounds until told to stop."""

    def __init__(self, directory: Path, url: str, api_key: str) -> None:
        self._directory = directory
        self._stop = directory / "stop"
        directory.mkdir()
        self._processes = {name: self._start(name, url, api_key) for name in ROUNDS}

    def num_results(self) -> int:
        """Lines recorded so far, by all."""
        return sum(self._record(name).read_bytes().count(b"\n") for name in ROUNDS if self._record(name).exists())

    def wait_for_results(self, number: int, *, timeout_s: float) -> None:
        """Return once there are so many results.

        Raises:
            ClientsStuckError: nothing came for `timeout_s`, or a script ended.
        """
        last, changed_at = self.num_results(), time.monotonic()
        while (now := self.num_results()) < number:
            self._check_alive()
            if now != last:
                last, changed_at = now, time.monotonic()
            if time.monotonic() - changed_at > timeout_s:
                raise ClientsStuckError(f"no client got a result for {timeout_s:.0f} s")
            time.sleep(LOOK_S)

    def wait_for_round(self, number: int, *, timeout_s: float) -> None:
        """Return once every script has ended its round `number`; raises as `wait_for_results`."""
        while not all(number in record.done for record in self.records().values()):
            self.wait_for_results(self.num_results() + 1, timeout_s=timeout_s)

    def finish(self, *, timeout_s: float) -> None:
        """Let each script end its round.

        Raises:
            ClientsStuckError: it did not, or failed; says how.
        """
        self._stop.touch()
        deadline = time.monotonic() + timeout_s
        for name, process in self._processes.items():
            try:
                status = process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise ClientsStuckError(f"script {name} did not end its round in {timeout_s:.0f} s") from None
            if status:
                raise ClientsStuckError(f"script {name} failed:\n{self._last_words(name)}")

    def kill(self) -> None:
        """End what still runs."""
        for process in self._processes.values():
            process.kill()
            process.wait()

    def records(self) -> Mapping[str, Record]:
        """What each script has got so far."""
        return {name: _read(self._record(name)) for name in ROUNDS}

    def _start(self, name: str, url: str, api_key: str) -> subprocess.Popen[bytes]:
        arguments = ["--url", url, "--record", str(self._record(name)), "--stop", str(self._stop)]
        with (self._directory / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.scripts", name, *arguments],
                env={**os.environ, "TINKER_API_KEY": api_key},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _record(self, name: str) -> Path:
        return self._directory / f"{name}.jsonl"

    def _check_alive(self) -> None:
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise ClientsStuckError(f"script {name} ended:\n{self._last_words(name)}")

    def _last_words(self, name: str) -> str:
        return "\n".join((self._directory / f"{name}.log").read_text(errors="replace").splitlines()[-15:])


def _read(path: Path) -> Record:
    rounds: dict[int, list[Any]] = defaultdict(list)
    done, times = set(), []
    text = path.read_text() if path.exists() else ""
    for line in text.split("\n")[:-1]:  # the last may be half written
        entry = json.loads(line)
        times.append(float(entry["at"]))
        if "done" in entry:
            done.add(int(entry["round"]))
        else:
            rounds[int(entry["round"])].append(entry["values"])
    return Record(rounds, frozenset(done), times)

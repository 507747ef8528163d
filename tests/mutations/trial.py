"""A copy of the repository in which guards are taken away, one at a time, and their tests run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.mutations import verdict
from tests.mutations.guard import Guard

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600


class GuardNotFoundError(Exception):
    """What is to be replaced does not stand in the sources exactly once: correct tests/mutations/guards.py."""


@dataclass(frozen=True)
class Trial:
    """What became of a guard's tests: `passed`, `asserted`, `broken` or `missing`, by test."""

    guard: Guard
    verdicts: Mapping[str, str]

    @property
    def is_caught(self) -> bool:
        """Whether each of its tests has failed by an assertion."""
        return all(verdict == "asserted" for verdict in self.verdicts.values())


class Copy:
    """A copy of what git knows or would add."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "copy"
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT,
            capture_output=True,
            check=True,
            text=True,
        )
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (self._directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self._directory / name)

    def without(self, guard: Guard) -> Trial:
        """Take a guard away, run its tests, and put it back.

        Raises:
            GuardNotFoundError: the sources have changed.
        """
        kept = {change.path: (self._directory / change.path).read_text(encoding="utf-8") for change in guard.changes}
        try:
            for change in guard.changes:
                fault = change.fault(self._directory)
                if fault is not None:
                    raise GuardNotFoundError(f"{guard.name}: {fault}")
                file = self._directory / change.path
                file.write_text(file.read_text(encoding="utf-8").replace(change.old, change.new), encoding="utf-8")
            return Trial(guard, self.run(guard.red))
        finally:
            for path, text in kept.items():
                (self._directory / path).write_text(text, encoding="utf-8")

    def run(self, tests: Collection[str]) -> dict[str, str]:
        """Run tests, and return what became of each; those on servers are left out."""
        written = self._directory.with_name("verdicts.json")
        written.unlink(missing_ok=True)
        options = ["-q", "-m", "not servers", "-p", "no:cacheprovider", "-p", verdict.__name__]
        environment = {
            **os.environ,
            verdict.VARIABLE: str(written),
            "PYTHONPATH": str(self._directory),
            "PYTHONDONTWRITEBYTECODE": "1",  # sources change within a second, and may keep their size
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *sorted(tests)],
            cwd=self._directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if not written.is_file():
            raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        verdicts = json.loads(written.read_text())
        return {test: verdicts.get(test, "missing") for test in tests}

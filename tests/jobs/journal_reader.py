"""Stands in for the dispatcher: remembers what was announced, and whether the journal had it by then."""

from dataclasses import dataclass, field

from storage import journal
from storage.database import Database


@dataclass
class Announcements:
    """What was announced.

    Attributes:
        found_the_row: for each announced run, whether another connection saw operations of it.
    """

    database: Database
    runs: list[str] = field(default_factory=list)
    found_the_row: list[bool] = field(default_factory=list)
    samples: int = 0

    def announce_run(self, run_id: str) -> None:
        """A run has work."""
        self.runs.append(run_id)
        with self.database.read() as tx:
            self.found_the_row.append(bool(journal.list_operations(tx, run_id, limit=1)))

    def announce_samples(self) -> None:
        """Samples wait."""
        self.samples += 1

"""Announcements that are held against the journal at once: it must have what they announce by then."""

from __future__ import annotations

from dataclasses import dataclass, field

from storage import journal
from storage.database import Database
from tests.announcements import Announcements


@dataclass
class CheckedAnnouncements(Announcements):
    """What was announced.

    Attributes:
        found_the_row: for each announced run, whether another connection saw operations of it.
    """

    database: Database = field(kw_only=True)
    found_the_row: list[bool] = field(default_factory=list)

    def announce_run(self, run_id: str) -> None:
        """A run has work."""
        super().announce_run(run_id)
        with self.database.read() as tx:
            self.found_the_row.append(bool(journal.list_operations(tx, run_id, limit=1)))

"""In the announcer's and the dispatcher's place: remembers what was announced, and tells nobody."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Announcements:
    """What was announced: runs in order, and how often that samples wait."""

    runs: list[str] = field(default_factory=list)
    samples: int = 0

    def announce_run(self, run_id: str) -> None:
        """A run has work."""
        self.runs.append(run_id)

    def announce_samples(self) -> None:
        """Samples wait."""
        self.samples += 1

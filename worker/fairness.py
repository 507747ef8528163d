"""Whose turn it is: between accounts, and between training and sampling, whoever has had the least device time.

Each (account, activity) has a virtual time that grows with the device time it consumed. One that was idle starts at the
time of those who are busy, so nobody saves up turns, and keeps what it is ahead of them, so nobody sheds what it
consumed by pausing (as in Linux's completely fair scheduler).
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

AccountId = str


class Activity(StrEnum):
    """What device time is spent on."""

    TRAINING = "training"
    SAMPLING = "sampling"


Claimant = tuple[AccountId, Activity]


class FairShare:
    """Device time consumed by each claimant, in nanoseconds of virtual time."""

    def __init__(self) -> None:
        self._consumed: dict[Claimant, int] = {}
        self._floor = 0

    def order(self, waiting: Collection[Claimant]) -> list[Claimant]:
        """Those who wait, the one who is owed most first."""
        self._admit(waiting)
        return sorted(waiting, key=lambda claimant: (self._consumed[claimant], claimant))

    def charge(self, claimant: Claimant, device_ns: int) -> None:
        """Add device time that a claimant consumed."""
        self._consumed[claimant] = self._consumed.get(claimant, 0) + device_ns

    def _admit(self, waiting: Collection[Claimant]) -> None:
        """Let newcomers start level with the least of those already waiting, and forget who is not ahead of that."""
        known = [self._consumed[claimant] for claimant in waiting if claimant in self._consumed]
        self._floor = max(self._floor, min(known, default=self._floor))
        ahead = {claimant: consumed for claimant, consumed in self._consumed.items() if consumed > self._floor}
        self._consumed = dict.fromkeys(waiting, self._floor) | ahead

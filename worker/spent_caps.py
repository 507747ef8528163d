"""Which hard caps are spent, as far as this worker knows without asking.

Its own commits tell at once; what others spend, and where there is room again, is read now and then. Who believes that
a cap is spent which is not draws a little later; so whatever was told while others were being read stays.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from billing.budgets import Cap
from billing.dimensions import Dimensions


class SpentCaps:
    """Caps that pause what they cover. Locked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_account: dict[str, dict[int, Cap]] = {}
        self._num_told = 0
        self._version = 0

    @property
    def version(self) -> int:
        """Another number after every change: as long as it is the same, so is what is paused."""
        with self._lock:
            return self._version

    @property
    def mark(self) -> int:
        """To be handed to `replace` by one who takes it before he begins to read."""
        with self._lock:
            return self._num_told

    def pause(self, payer: Dimensions) -> bool:
        """Whether one of them covers this."""
        with self._lock:
            return any(cap.covers(payer) for cap in self._by_account.get(payer.account_id, {}).values())

    def add(self, spent: Iterable[Cap]) -> None:
        """A commit has found these spent."""
        with self._lock:
            self._num_told += 1
            new = [cap for cap in spent if cap.id not in self._by_account.get(cap.account_id, {})]
            if new:
                self._set({**self._by_id(), **{cap.id: cap for cap in new}})

    def replace(self, spent: Iterable[Cap], *, since: int) -> None:
        """These have been read, and are all; unless a commit has told of more since the mark: that may be newer."""
        with self._lock:
            told = self._by_id() if self._num_told != since else {}
            self._set({**told, **{cap.id: cap for cap in spent}})

    def _by_id(self) -> dict[int, Cap]:
        return {id_: cap for caps in self._by_account.values() for id_, cap in caps.items()}

    def _set(self, spent: dict[int, Cap]) -> None:
        if spent.keys() == self._by_id().keys():
            return
        self._version += 1
        self._by_account = {}
        for cap in spent.values():
            self._by_account.setdefault(cap.account_id, {})[cap.id] = cap

"""Work of one request's tokens in the engine's units, by which a step's device time is split."""

from __future__ import annotations

from worker.engine.adapter import Adapter
from worker.engine.base_model import BaseModel
from worker.engine.work import FORWARD, work_units


class WorkRate:
    """What `work_units` says of a request's tokens, asked once: it is linear in tokens and in attended pairs."""

    def __init__(self, base_model: BaseModel, adapter: Adapter | None) -> None:
        alone = work_units(base_model, adapter, [(1, 0)], factor=FORWARD)
        self._per_pair = work_units(base_model, adapter, [(1, 1)], factor=FORWARD) - alone
        self._per_token = alone - self._per_pair
        self.per_head_row = FORWARD * base_model.head_weight.numel()
        """Units of one row of the output projection alone."""

    def tokens(self, start: int, stop: int) -> int:
        """Units of the tokens at positions `[start, stop)` of one sequence, each attending to all up to itself."""
        num_pairs = (start + 1 + stop) * (stop - start) // 2
        return self._per_token * (stop - start) + self._per_pair * num_pairs

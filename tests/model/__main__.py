"""Explore the model further than the tests do: `python -m tests.model` prints how many states there are."""

from __future__ import annotations

import time

from tests.model.takeover import Rules
from tests.model.test_takeover import explore

WIDE = (
    Rules(),
    Rules(workers=3, zombies_upload=False),
    Rules(operations=3, zombies_upload=False),
    Rules(workers=1, operations=5),
)

for rules in WIDE:
    begun = time.monotonic()
    print(f"{explore(rules):9,d} states  {time.monotonic() - begun:6.1f} s  {rules}", flush=True)

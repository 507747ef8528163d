"""A script that trains, in a process whose SDK believes that time flies while it waits for a budget.

    python -m tests.wire.hurried_script URL API_KEY STEPS [PAUSE_MAX_S]

The SDK asks again every 5 s after a 402. Here each of these pauses is over at once and counts as four minutes, on the
clock by which the SDK judges how long it has been waiting; everything else runs on the real one. Every line printed is
JSON: `waited_s` again and again, at last `losses`, or `error` with its type.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tinker
from tinker.lib import internal_client_holder as sdk

from tests.setups.deployment import MODEL
from tests.setups.test_sdk import train

PAUSE_S = 5
COUNTS_AS_S = 240.0
"""More than 300 s between two looks at the clock, and the SDK begins to count anew."""
LASTS_S = 0.02
TOLD_EVERY_S = 0.2
PATIENCE_S = 300.0


class Hurried:
    """Stands in for the modules `time` and `asyncio` in the SDK's code that waits."""

    def __init__(self) -> None:
        self.waited_s = 0.0
        self._has_paused = False

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name) if hasattr(asyncio, name) else getattr(time, name)

    def monotonic(self) -> float:
        """The real clock, and what pauses have counted as; several at once count as one."""
        self.waited_s += COUNTS_AS_S * self._has_paused
        self._has_paused = False
        return time.monotonic() + self.waited_s

    async def sleep(self, seconds: float) -> None:
        """A pause for a budget is over at once; any other is as long as it is."""
        if seconds != PAUSE_S:
            await asyncio.sleep(seconds)
            return
        self._has_paused = True
        await asyncio.sleep(LASTS_S)


def main(url: str, api_key: str, steps: int, pause_max_s: float | None) -> None:
    """Train, and tell how long the SDK thinks that it has waited.

    Args:
        pause_max_s: how long it is to wait, instead of what the service tells it.
    """
    hurried = Hurried()
    sdk.time = sdk.asyncio = hurried  # type: ignore[attr-defined, assignment]  # names in its own code; a stand-in for modules has no type

    def losses() -> list[tuple[float, float]]:
        with tinker.ServiceClient(base_url=url, api_key=api_key) as client:
            training = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
            if pause_max_s is not None:
                told = {"billing_exception_max_pause_duration_sec": pause_max_s}
                client.holder._client_config = client.holder._client_config.model_copy(update=told)
            return train(training, steps)

    ends_at = time.monotonic() + PATIENCE_S
    with ThreadPoolExecutor(1) as pool:
        trained = pool.submit(losses)
        while not trained.done() and time.monotonic() < ends_at:
            print(json.dumps({"waited_s": hurried.waited_s}), flush=True)
            time.sleep(TOLD_EVERY_S)
        if not trained.done():
            print(json.dumps({"error": f"not done after {PATIENCE_S} s", "waited_s": hurried.waited_s}), flush=True)
            os._exit(1)
    error = trained.exception()
    told = {"losses": trained.result()} if error is None else {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({**told, "waited_s": hurried.waited_s}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]) if sys.argv[4:] else None)

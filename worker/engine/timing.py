"""Device time of a block of the engine's work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Measurement:
    """What a clock measured; complete when its block has ended."""

    device_ns: int = 0


class DeviceClock:
    """Measures how long a block keeps the device busy.

    On CUDA by events around the block on the current stream, waiting for its end. On CPU the smaller of wall time and
    process CPU time divided by the threads of torch, so that neither waiting nor the machine's other work counts.

    Attributes:
        busy_ns: of all blocks together, by a second reading taken around the first: what is billed and what is wasted
            is held against it. A block within a block counts once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._depth = 0
        self.busy_ns = 0

    @contextmanager
    def measure(self) -> Iterator[Measurement]:
        """Measure the block, also when it raises."""
        measurement = Measurement()
        read = self._read_cuda if self._device.type == "cuda" else self._read_cpu
        self._depth += 1
        around, within = read(), read()
        try:
            yield measurement
        finally:
            measurement.device_ns = within()
            self._depth -= 1
            if self._depth == 0:
                self.busy_ns += around()

    def _read_cuda(self) -> Callable[[], int]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        stream = torch.cuda.current_stream(self._device)
        start.record(stream)

        def since() -> int:
            end.record(stream)
            end.synchronize()
            return int(start.elapsed_time(end) * 1e6)

        return since

    def _read_cpu(self) -> Callable[[], int]:
        num_threads = torch.get_num_threads()
        wall_ns, cpu_ns = time.perf_counter_ns(), time.process_time_ns()

        def since() -> int:
            wall, cpu = time.perf_counter_ns() - wall_ns, time.process_time_ns() - cpu_ns
            return min(wall, cpu // num_threads)

        return since

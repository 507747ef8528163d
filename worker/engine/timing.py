"""Device time of a block of the engine's work."""

from __future__ import annotations

import time
from collections.abc import Iterator
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
        read = _CudaReadings if self._device.type == "cuda" else _CpuReadings
        self._depth += 1
        readings = read(self._device)
        try:
            yield measurement
        finally:
            measurement.device_ns, around_ns = readings.end()
            self._depth -= 1
            if self._depth == 0:
                self.busy_ns += around_ns


class _CudaReadings:
    """Two pairs of events, one within the other."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]  # type: ignore[no-untyped-call]
        self._stream = torch.cuda.current_stream(device)
        for event in self._events[:2]:
            event.record(self._stream)

    def end(self) -> tuple[int, int]:
        """Nanoseconds within and around."""
        for event in self._events[2:]:
            event.record(self._stream)
        self._events[3].synchronize()
        around, within, end, around_end = self._events
        return int(within.elapsed_time(end) * 1e6), int(around.elapsed_time(around_end) * 1e6)


class _CpuReadings:
    """Two readings of wall time, one within the other, and one of CPU time.

    A reading of CPU time takes 2-3 µs; two of them, one within the other, would differ by 0.1 % of a short step.
    """

    def __init__(self, _device: torch.device) -> None:
        self._cpu = time.process_time_ns()
        self._around = time.perf_counter_ns()
        self._within = time.perf_counter_ns()

    def end(self) -> tuple[int, int]:
        """Nanoseconds within and around."""
        end = time.perf_counter_ns()
        around_end = time.perf_counter_ns()
        busy_ns = (time.process_time_ns() - self._cpu) // torch.get_num_threads()
        return min(end - self._within, busy_ns), min(around_end - self._around, busy_ns)

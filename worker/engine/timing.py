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
    """Two readings of two clocks, one within the other; those of the slower clock directly after each other."""

    def __init__(self, _device: torch.device) -> None:
        wall, cpu = time.perf_counter_ns, time.process_time_ns
        self._around_wall, self._around_cpu, self._cpu, self._wall = wall(), cpu(), cpu(), wall()

    def end(self) -> tuple[int, int]:
        """Nanoseconds within and around."""
        wall, cpu = time.perf_counter_ns, time.process_time_ns
        end_wall, end_cpu, around_end_cpu, around_end_wall = wall(), cpu(), cpu(), wall()
        threads = torch.get_num_threads()
        within = min(end_wall - self._wall, (end_cpu - self._cpu) // threads)
        return within, min(around_end_wall - self._around_wall, (around_end_cpu - self._around_cpu) // threads)

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
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @contextmanager
    def measure(self) -> Iterator[Measurement]:
        """Measure the block, also when it raises."""
        measurement = Measurement()
        measuring = self._measure_cuda if self._device.type == "cuda" else self._measure_cpu
        with measuring(measurement):
            yield measurement

    @contextmanager
    def _measure_cuda(self, measurement: Measurement) -> Iterator[None]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        stream = torch.cuda.current_stream(self._device)
        start.record(stream)
        try:
            yield
        finally:
            end.record(stream)
            end.synchronize()
            measurement.device_ns = round(start.elapsed_time(end) * 1e6)

    @contextmanager
    def _measure_cpu(self, measurement: Measurement) -> Iterator[None]:
        wall_ns, cpu_ns = time.perf_counter_ns(), time.process_time_ns()
        try:
            yield
        finally:
            wall_ns, cpu_ns = time.perf_counter_ns() - wall_ns, time.process_time_ns() - cpu_ns
            measurement.device_ns = min(wall_ns, cpu_ns // torch.get_num_threads())

from __future__ import annotations

import threading

import pytest
import torch

from worker.engine.timing import DeviceClock


def test_waiting_is_not_device_time_on_cpu() -> None:
    with DeviceClock(torch.device("cpu")).measure() as measurement:
        threading.Event().wait(0.05)
    assert measurement.device_ns < 40_000_000


def test_computing_is_device_time_also_when_it_fails() -> None:
    def compute_and_fail() -> None:
        for _ in range(20):
            torch.randn(200, 200) @ torch.randn(200, 200)
        raise RuntimeError("stopped")

    clock = DeviceClock(torch.device("cpu"))
    with pytest.raises(RuntimeError), clock.measure() as measurement:
        compute_and_fail()
    assert measurement.device_ns > 0

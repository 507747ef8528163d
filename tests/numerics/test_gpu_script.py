"""The script for GPU machines runs anywhere, so that it works when one is at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "run.sh"


@pytest.mark.processes
def test_gpu_script_checks_numerics_and_prints_throughput_on_cpu() -> None:
    # when
    done = subprocess.run(
        [SCRIPT, "--device", "cpu", "--size", "nano"],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    # then
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all hold" in done.stdout
    assert done.stdout.count("tokens/s") == 3

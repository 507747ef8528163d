"""What the bits of a result depend on beside the operation and the run's state.

Two workers with equal numerics compute the same bits. A snapshot holds those of its writer, so that a worker that
computes otherwise does not take a run over unnoticed.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from worker.engine.rows import Products

SEGMENT_TOKENS = 1024
"""Tokens of one segment of a large operation in deterministic mode, since where it is cut shows in the bits of its
gradients."""
HEAD_ROWS = 256
"""Rows whose logits exist at once in deterministic mode, for the same reason."""
_VARIABLES = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
_ROWS = "rows of "
_CPUINFO = Path("/proc/cpuinfo")


def is_deterministic(setting: str, device: torch.device) -> bool:
    """What `PIECEWORK_DETERMINISTIC` means on a device; on CUDA, kernels that do not repeat are forbidden with it."""
    if setting == "off" or (setting == "auto" and device.type != "cpu"):
        return False
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is taken
        torch.use_deterministic_algorithms(True)
    return True


def describe(device: torch.device, dtype: torch.dtype, products: Products) -> dict[str, str]:
    """Numerics of a base model here, by name."""
    numerics = {
        "deterministic": "on" if products.exact else "off",
        "device": _processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "grid": f"{SEGMENT_TOKENS}/{HEAD_ROWS}",
    }
    numerics |= {f"{_ROWS}{shape}": str(rule) for shape, rule in products.rules.items()}
    numerics |= {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return numerics


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """What two numerics disagree about; products that only one of them has met are no disagreement."""
    return {
        name: (one.get(name, ""), other.get(name, ""))
        for name in sorted({*one, *other})
        if one.get(name, "") != other.get(name, "")
        and not (name.startswith(_ROWS) and (name not in one or name not in other))
    }


@cache
def _processor() -> str:
    """Name of the processor and of the instructions that torch uses."""
    name = platform.machine()
    if _CPUINFO.exists():
        lines = _CPUINFO.read_text(errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"

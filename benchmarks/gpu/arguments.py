"""What both scripts take."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

SIZES = ("nano", "tiny", "small", "0.6b")


@dataclass(frozen=True)
class Arguments:
    """Where to run, and how large a model the throughput is measured on."""

    device: torch.device
    size: str
    dtype: torch.dtype


def parse_arguments() -> Arguments:
    """Read the command line; says what is missing where the device is not there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--size", choices=SIZES, help="default: 0.6b on CUDA, tiny on CPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA, float32 on CPU")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"there is no {device}; use --device cpu")
    on_cpu = device.type == "cpu"
    dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    return Arguments(device, options.size or ("tiny" if on_cpu else "0.6b"), getattr(torch, dtype))


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"

"""What an exception of the engine means: for the operation that raised it, and for the worker."""

from __future__ import annotations

import structlog
import torch

from jobs.operations import Category, Failure
from storage.errors import StorageError
from storage.journal import Operation
from worker.engine.errors import EngineError

log = structlog.get_logger()


def failure_of(operation: Operation, error: Exception) -> Failure:
    """The outcome of an operation that raised while nothing else ran: whose fault it is says the error's class."""
    if isinstance(error, EngineError | StorageError | ValueError):
        fault = getattr(error, "fault", "user")
        return Failure(str(error), Category(fault))
    log.error("operation_failed", request=operation.request_id, exc_info=error)
    raise_if_device_is_lost(error)
    return unexpected(error, "operation")


def unexpected(error: Exception, noun: str) -> Failure:
    """The outcome of an operation that broke a step which it had for itself.

    Args:
        noun: what it is called: `operation` or `sample`.
    """
    if is_out_of_memory(error):
        return Failure(
            f"the {noun} does not fit into the worker's memory, even alone; submit less at once: fewer or shorter "
            f"datums, a shorter prompt, fewer samples ({error})",
            Category.SERVER,
        )
    return Failure(f"the {noun} could not be computed: {error}", Category.SERVER)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was wanting, of the machine or of the device; torch has no class of its own for the machine's."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def may_pass(error: Exception) -> bool:
    """Whether the same may succeed later or elsewhere, whatever it is done with."""
    return is_out_of_memory(error) or isinstance(error, torch.AcceleratorError)


def raise_if_device_is_lost(error: Exception) -> None:
    """End the worker when its device takes no more work: another one replays, and nothing fails."""
    if isinstance(error, torch.AcceleratorError):
        raise error


def free_unused_memory(device: torch.device) -> None:
    """Give cached blocks back before trying again in smaller portions."""
    if device.type == "cuda":
        torch.cuda.empty_cache()

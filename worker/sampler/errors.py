"""Errors of the sampler.

SamplerError
└── OutOfBlocksError    handled by the scheduler, which preempts and tries again
"""

from __future__ import annotations


class SamplerError(Exception):
    """The sampler cannot go on with what it was asked to do."""


class OutOfBlocksError(SamplerError):
    """The key-value cache has no free block left; finish or preempt a sequence first."""

    def __init__(self, *, wanted: int, free: int) -> None:
        super().__init__(f"{wanted} blocks of the key-value cache are wanted, {free} are free")
        self.wanted = wanted
        self.free = free

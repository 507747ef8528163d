"""Errors of the engine.

    EngineError
    ├── UnsupportedModelError     the base model cannot be trained correctly here
    ├── UnsupportedAdapterError   no such adapter on this base model
    └── UnreadableStateError      stored state does not fit the run, or is damaged

All are the caller's to mend, and trying again does not help.
"""

from __future__ import annotations


class EngineError(Exception):
    """The engine cannot do what was asked; the message says what to change."""


class UnsupportedModelError(EngineError):
    """The base model cannot be run correctly; choose another."""


class UnsupportedAdapterError(EngineError):
    """The base model has no place for the adapter that was asked for."""


class UnreadableStateError(EngineError):
    """Stored weights or optimizer state do not fit this run, or are damaged."""

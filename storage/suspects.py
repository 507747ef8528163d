"""What a worker's death is held against: the operations that were being executed, and only if they were alone.

A death names no culprit among the members of a packed batch, so all become suspects and run one at a time from then on.
A death while an operation runs alone counts against that operation, in `operation.blame`: the number of deaths of each
cause, two decimal digits a cause (3_00_01_05 is 3 faults, none for want of memory, 1 of unknown cause, 5 by a hand).
What they weigh is `_WEIGHT`; at `BOUND` the operation is condemned: it fails when its turn comes, and is not executed.

                            weight   deaths until it fails
    fault, out of memory        20   3
    unknown                      6   10
    somebody's hand              1   60
    stopped by ourselves         0   -

Completion clears everything, by being final.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from sqlalchemy import case, false, or_, true

from storage import tables


class Cause(StrEnum):
    """How a worker process ended."""

    FAULT = "fault"
    """It crashed, exited with an error, or its watchdog ended a step that passed its deadline."""
    OUT_OF_MEMORY = "out_of_memory"
    """The kernel killed it for want of memory."""
    UNKNOWN = "unknown"
    """Its leases or claims expired and nobody saw why: machine lost, network lost, preempted, or any other cause."""
    HAND = "hand"
    """A signal that somebody sent, with no sign that the kernel did."""
    STOPPED = "stopped"
    """It was asked to leave, or its supervisor ended it: nobody's fault."""


BOUND = 60
_WEIGHT = {Cause.FAULT: 20, Cause.OUT_OF_MEMORY: 20, Cause.UNKNOWN: 6, Cause.HAND: 1}
UNIT = {Cause.HAND: 1, Cause.UNKNOWN: 100, Cause.OUT_OF_MEMORY: 100**2, Cause.FAULT: 100**3}
_PLAIN = {
    Cause.FAULT: "it crashed, or passed the deadline of a step",
    Cause.OUT_OF_MEMORY: "it ran out of memory",
    Cause.UNKNOWN: "it was gone, its lease expired",
    Cause.HAND: "it was killed by a signal",
}


def values_after_death(cause: Cause, *, had_company: bool = False) -> dict[str, Any]:
    """Columns of an operation that was being executed when its worker died; for an UPDATE that puts it back.

    A sample is claimed long before it is stepped, and many are at once. One death by a hand or of unknown cause would
    make hundreds of innocents run one at a time: it needs a second one.
    """
    if cause is Cause.STOPPED:
        return {"alone": false()}
    table = tables.operation.c
    pointing = cause in (Cause.FAULT, Cause.OUT_OF_MEMORY)
    suspected = true() if pointing else or_(table.suspect, table.run_id.is_not(None), table.attempts > 1)
    return {
        "suspect": suspected,
        "blame": table.blame if had_company else table.blame + case((table.alone, UNIT[cause]), else_=0),
        "alone": false(),
    }


def deaths_alone(blame: int) -> Mapping[Cause, int]:
    """How often each cause ended a worker on which an operation ran alone."""
    return {cause: blame // unit % 100 for cause, unit in UNIT.items()}


def is_condemned(blame: int) -> bool:
    """Whether an operation has ended too many workers to be executed again."""
    return blame > 0 and sum(_WEIGHT[cause] * number for cause, number in deaths_alone(blame).items()) >= BOUND


def history(blame: int) -> str:
    """What a condemned operation has done, in words."""
    deaths = {cause: number for cause, number in deaths_alone(blame).items() if number}
    how = ", ".join(f"{number} x {_PLAIN[cause]}" for cause, number in sorted(deaths.items(), reverse=True))
    return f"ended its worker {sum(deaths.values())} times while it ran alone ({how})"


def sentence(blame: int) -> str:
    """The error of a condemned operation: what happened and what to change."""
    return (
        f"the operation has {history(blame)}, and is not tried again. Submit less at once: fewer or shorter datums, a "
        "shorter prompt, fewer samples or tokens. Should a small one do the same, tell whoever runs the service: the "
        "logs of its workers say where they ended"
    )

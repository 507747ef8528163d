"""Which fault follows which: drawn from the seed alone, so that a schedule can be repeated.

Every other fault comes at a random moment, to a process or a server; those between are armed at the named points of
`storage.failpoints`, dealt like cards, so that each point has its turn before one comes again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Literal

from storage.failpoints import Point

SetUp = Literal["embedded", "deployed"]


class Act(StrEnum):
    """What is done."""

    KILL = "kill"  # SIGKILL
    STOP = "stop"  # SIGSTOP, SIGCONT after a while
    EMPTY = "empty"  # killed, and started again with nothing in it
    CUT = "cut"  # its connections are closed, new ones refused
    HOLD = "hold"  # its connections stay open, nothing passes
    POINT_KILL = "kill at a point"
    POINT_STOP = "stop at a point"
    POINT_PAUSE = "pause at a point"


AT_POINT = (Act.POINT_KILL, Act.POINT_STOP, Act.POINT_PAUSE)


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        target: a role (`worker`, `api` …), a server (`database` …), a link between them, or a named point.
        which: of several processes of a role, the one with this number, counted round.
        lasts_s: of a stop, a pause, a cut.
        after_records: results that clients must have got since the fault before.
        delay_s: the random moment: how long after that it comes.
    """

    act: Act
    target: str
    which: int
    lasts_s: float
    after_records: int
    delay_s: float

    @property
    def kind(self) -> str:
        """What is done, and to what."""
        return f"{self.act}: {self.target}"

    def __str__(self) -> str:
        return f"{self.kind} for {self.lasts_s:.1f} s" if self.lasts_s else self.kind


COMMON: Sequence[tuple[Act, str, int]] = (
    (Act.KILL, "worker", 6),
    (Act.KILL, "api", 3),
    (Act.KILL, "forkserver", 1),
    (Act.KILL, "scheduler", 1),
    (Act.KILL, "broker", 2),
    (Act.EMPTY, "broker", 2),
    (Act.STOP, "worker", 4),
    (Act.STOP, "api", 2),
    (Act.STOP, "scheduler", 1),
    (Act.STOP, "broker", 1),
    (Act.CUT, "clients", 3),
    (Act.HOLD, "clients", 1),
)
"""How often, of what may come at random moments on either set-up."""

OWN: dict[SetUp, Sequence[tuple[Act, str, int]]] = {
    "embedded": ((Act.KILL, "supervisor", 2),),
    "deployed": (
        (Act.KILL, "supervisor", 2),
        (Act.KILL, "database", 2),
        (Act.STOP, "database", 1),
        (Act.CUT, "database", 2),
        (Act.HOLD, "database", 1),
        (Act.KILL, "store", 2),
        (Act.STOP, "store", 1),
        (Act.CUT, "store", 2),
        (Act.HOLD, "store", 1),
        (Act.CUT, "broker", 1),
        (Act.HOLD, "broker", 1),
    ),
}


def all_kinds(setup: SetUp) -> Sequence[str]:
    """Of all faults that this set-up may meet."""
    at_points = [f"{act}: {point}" for act in AT_POINT for point in Point]
    return [f"{act}: {target}" for act, target, _ in (*COMMON, *OWN[setup])] + at_points


def faults(setup: SetUp, seed: int, *, lease_s: float, only: Sequence[str] = ()) -> Iterator[Fault]:
    """All faults of a seed, without end.

    Args:
        setup: says what there is that may fail.
        seed: of everything that is random.
        lease_s: half of what stops is stopped for longer than a lease lasts.
        only: what a fault's kind must contain, any one of them; empty for all. Something must.
    """
    drawn = _drawn(setup, seed, lease_s)
    return (fault for fault in drawn if not only or any(part in fault.kind for part in only))


def _drawn(setup: SetUp, seed: int, lease_s: float) -> Iterator[Fault]:
    random = Random(seed)
    deck = _points(random)
    kinds = [*COMMON, *OWN[setup]]
    weights = [weight for _, _, weight in kinds]
    for number in itertools.count():
        if number % 2:
            act, target = next(deck)
        else:
            act, target, _ = random.choices(kinds, weights)[0]
        yield Fault(
            act,
            target,
            which=random.randrange(2),
            lasts_s=_lasts_s(random, act, lease_s),
            after_records=random.randint(1, 4),
            delay_s=round(random.uniform(0.0, 0.6), 3),
        )


def _points(random: Random) -> Iterator[tuple[Act, str]]:
    """Every point with every act, again and again; no point twice before each had its turn."""
    acts = {point: random.sample(AT_POINT, len(AT_POINT)) for point in Point}
    for turn in itertools.count():
        for point in random.sample(list(Point), len(Point)):
            yield acts[point][turn % len(AT_POINT)], str(point)


def _lasts_s(random: Random, act: Act, lease_s: float) -> float:
    if act in (Act.KILL, Act.EMPTY, Act.POINT_KILL):
        return 0.0
    long = random.random() < 0.5
    return round(random.uniform(1.1, 1.8) * lease_s if long else random.uniform(0.2, 1.0), 1)

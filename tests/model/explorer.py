"""Looks at every reachable state of a model, breadth first, so that what it finds wrong comes with a shortest trace."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

State = TypeVar("State", bound=Hashable)

STATES_MAX = 2_000_000


@dataclass(frozen=True)
class Step:
    """What happens, and the state it leads to."""

    name: str
    state: object


class BrokenPropertyError(Exception):
    """A reachable state in which a property does not hold, or from which no goal can be reached."""

    def __init__(self, reason: str, trace: list[Step]) -> None:
        steps = "\n".join(f"  {number:2d}. {step.name}\n      {step.state}" for number, step in enumerate(trace))
        super().__init__(f"{reason}; {len(trace) - 1} steps lead there:\n{steps}")
        self.reason = reason
        self.trace = trace


class Explorer(Generic[State]):
    """Explores one model.

    Args:
        successors: what may happen in a state, each by name, and where it leads.
        fault: which property does not hold in a state, or None.
        is_goal: whether everything is done; must stay reachable from everywhere.
    """

    def __init__(
        self,
        initial: State,
        successors: Callable[[State], Iterator[tuple[str, State]]],
        fault: Callable[[State], str | None],
        is_goal: Callable[[State], bool],
    ) -> None:
        self._successors = successors
        self._fault = fault
        self._is_goal = is_goal
        self._number = {initial: 0}
        self._states = [initial]
        self._parents = array("l", [0])
        self._names = ["begin"]
        self._sources = array("l")
        self._targets = array("l")

    def explore(self) -> int:
        """Look at every state; returns how many there are.

        Raises:
            BrokenPropertyError: with the shortest trace to a state that is wrong.
        """
        place = 0
        while place < len(self._states):
            state = self._states[place]
            fault = self._fault(state)
            if fault is not None:
                raise BrokenPropertyError(fault, self._trace(place))
            for name, following in self._successors(state):
                self._add(place, name, following)
            place += 1
        stuck = self._first_stuck()
        if stuck is not None:
            raise BrokenPropertyError("from here nothing leads to the end", self._trace(stuck))
        return len(self._states)

    def _add(self, place: int, name: str, following: State) -> None:
        number = self._number.setdefault(following, len(self._states))
        if number == len(self._states):
            assert number < STATES_MAX, "the model is too large to be explored"
            self._states.append(following)
            self._parents.append(place)
            self._names.append(name)
        self._sources.append(place)
        self._targets.append(number)

    def _first_stuck(self) -> int | None:
        """The state, nearest to the beginning, from which no goal can be reached."""
        before: list[list[int]] = [[] for _ in self._states]
        for source, target in zip(self._sources, self._targets, strict=True):
            before[target].append(source)
        waiting = [place for place, state in enumerate(self._states) if self._is_goal(state)]
        leads = bytearray(len(self._states))
        for place in waiting:
            leads[place] = 1
        while waiting:
            for source in before[waiting.pop()]:
                if not leads[source]:
                    leads[source] = 1
                    waiting.append(source)
        found = leads.find(0)
        return None if found < 0 else found

    def _trace(self, place: int) -> list[Step]:
        steps = [Step(self._names[place], self._states[place])]
        while place:
            place = self._parents[place]
            steps.append(Step(self._names[place], self._states[place]))
        return steps[::-1]

"""What a step of the sampler did: who is finished, and whose work it was."""

from __future__ import annotations

from dataclasses import dataclass, field

from jobs.operations import Failure, SampleOutcome
from worker.sampler.sequence import Request


@dataclass(frozen=True, eq=False)
class Finished:
    """A request that needs no further step.

    Attributes:
        tokens_prefilled, tokens_cached: prompt tokens, counted once however many continuations: computed here, and
            found in the cache.
        tokens_sampled: of all continuations.
    """

    request_id: str
    outcome: SampleOutcome | Failure
    tokens_prefilled: int = 0
    tokens_cached: int = 0
    tokens_sampled: int = 0


@dataclass(eq=False)
class SamplerStep:
    """What one step did.

    Attributes:
        finished: requests whose outcome is there; the sampler has forgotten them.
        work: units by request id, for those in the step.
        overhead: units spent on computing again what a preemption had dropped; nobody is billed for them.
        device_ns: device time of the step.
    """

    finished: list[Finished] = field(default_factory=list)
    work: dict[str, int] = field(default_factory=dict)
    overhead: int = 0
    device_ns: int = 0

    def add_work(self, request: Request, units: int, *, again: bool) -> None:
        """Count units for a request, or as overhead if they were done before."""
        if again:
            self.overhead += units
        else:
            self.work[request.request_id] = self.work.get(request.request_id, 0) + units

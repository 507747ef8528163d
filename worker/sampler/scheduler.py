"""Who is in the next step: which prompts are prefilled, which sequences begin, which draw on.

    waiting ──seat and blocks──► running ──stop, max_tokens, context──► finished
       ▲                            │
       └─────────preempted──────────┘   an older sequence needs a block and none is free

What always holds: requests go in order of arrival, and only younger ones are ever preempted, so the oldest always
advances. A prompt begins behind what others have computed of it, and waits for what an older one computes in this step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from worker.sampler.blocks import BLOCK_TOKENS, BlockPool, BlockTable, Reserved
from worker.sampler.sequence import Request, Sequence, Status


@dataclass(frozen=True, eq=False)
class PromptChunk:
    """Prompt tokens `[start, stop)` of a request, computed in this step into `blocks`."""

    request: Request
    start: int
    stop: int
    table: BlockTable

    def full_blocks(self) -> list[tuple[int, bytes]]:
        """Places in the table of the full blocks that the chunk fills, and the keys of their contents."""
        places = range(self.start // BLOCK_TOKENS, min(self.stop // BLOCK_TOKENS, len(self.request.keys)))
        return [(place, self.request.keys[place]) for place in places]

    @property
    def is_last(self) -> bool:
        """Whether the prompt is complete after this chunk."""
        return self.stop == len(self.request.prompt)


@dataclass
class StepPlan:
    """What the next step does.

    Attributes:
        chunks: prompts to prefill.
        begins: sequences that draw their first token, from the last hidden state of their prompt.
        decodes: sequences that draw a further token; room for the last one's keys and values is reserved.
        reserved: what the cache must do before it is written.
        filling: keys of the blocks that the chunks will fill.
    """

    chunks: list[PromptChunk] = field(default_factory=list)
    begins: list[Sequence] = field(default_factory=list)
    decodes: list[Sequence] = field(default_factory=list)
    reserved: Reserved = field(default_factory=Reserved)
    filling: set[bytes] = field(default_factory=set)

    def reserve(self, pool: BlockPool, table: BlockTable, num_new: int) -> None:
        """Reserve room for tokens, and remember what the cache must do for it."""
        reserved = pool.reserve(table, num_new)
        self.reserved.fresh += reserved.fresh
        self.reserved.copies += reserved.copies


@dataclass
class _Room:
    """What a step can still take.

    Attributes:
        seats: sequences.
        tokens: of prompts.
    """

    seats: int
    tokens: int


class Scheduler:
    """Requests in order of arrival, and the blocks they hold."""

    def __init__(self, pool: BlockPool, *, sequences_max: int, tokens_max: int, chunk_tokens: int) -> None:
        """Start with nothing to do.

        Args:
            pool: blocks to give out; nobody else does.
            sequences_max: sequences that draw in one step.
            tokens_max: prompt tokens of one step; counts as `chunk_tokens` if it is less.
            chunk_tokens: prompt tokens of one request in one step, whole blocks.
        """
        self._pool = pool
        self._sequences_max = sequences_max
        self._tokens_max = max(tokens_max, chunk_tokens)
        self._chunk_tokens = chunk_tokens
        self._queue: dict[str, Request] = {}
        """Never admitted yet; all younger than the active ones."""
        self._active: dict[str, Request] = {}

    @property
    def has_work(self) -> bool:
        """Whether a request is left."""
        return bool(self._queue or self._active)

    @property
    def num_waiting(self) -> int:
        """Requests that have not been admitted."""
        return len(self._queue)

    def add(self, request: Request) -> None:
        """Put a request behind all others."""
        self._queue[request.request_id] = request

    def find(self, request_id: str) -> Request | None:
        """The request of this id, if it is not finished."""
        return self._active.get(request_id) or self._queue.get(request_id)

    def is_waiting(self, request_id: str) -> bool:
        """Whether a request has not been admitted."""
        return request_id in self._queue

    def remove(self, request: Request) -> None:
        """Forget a request and release what it holds."""
        self._queue.pop(request.request_id, None)
        self._active.pop(request.request_id, None)
        self._pool.release(request.table)
        for sequence in request.sequences:
            self._pool.release(sequence.table)

    def publish(self, chunk: PromptChunk) -> None:
        """Let others find the full blocks of a chunk that has been computed."""
        for place, key in chunk.full_blocks():
            self._pool.publish(chunk.table.blocks[place], key)

    def finish(self, sequence: Sequence) -> None:
        """Release what a finished sequence holds."""
        self._pool.release(sequence.table)

    def plan(self) -> StepPlan:
        """Choose what the next step does, and reserve room for it."""
        plan = StepPlan()
        active = list(self._active.values())
        running = sum(len(request.running()) for request in active)
        room = _Room(self._sequences_max - running, self._tokens_max)
        admitting = True  # once a request has to wait for room, nobody behind it is let past
        for age, request in enumerate(active):
            self._plan_decodes(plan, request, active[age:])
            if admitting and request.has_waiting:
                admitting = self._plan_waiting(plan, request, room)
        while admitting and self._queue:
            admitting = self._plan_waiting(plan, next(iter(self._queue.values())), room)
        return plan

    def _plan_decodes(self, plan: StepPlan, request: Request, not_older: list[Request]) -> None:
        """Let the running sequences of a request draw, at the cost of younger ones if blocks run out."""
        for sequence in request.running():
            while sequence.status is Status.RUNNING and self._is_short(sequence):
                self._preempt_youngest(sequence, not_older)
            if sequence.status is Status.RUNNING:
                plan.reserve(self._pool, sequence.table, 1)
                plan.decodes.append(sequence)

    def _is_short(self, sequence: Sequence) -> bool:
        return self._pool.num_missing(sequence.table, 1) > self._pool.num_free

    def _preempt_youngest(self, needy: Sequence, not_older: list[Request]) -> None:
        """Take back what the youngest holds; that is `needy` itself if nobody is younger."""
        for request in reversed(not_older):
            running = request.running()
            younger = running if request is not needy.request else running[running.index(needy) + 1 :]
            if younger:
                return self._preempt(younger[-1])
            if request.table.blocks:
                self._pool.release(request.table)
                request.last_hidden = None
                return None
        return self._preempt(needy)

    def _preempt(self, sequence: Sequence) -> None:
        self._pool.release(sequence.table)
        sequence.start_over()

    def _plan_waiting(self, plan: StepPlan, request: Request, room: _Room) -> bool:
        """Prefill a prompt, and let its sequences begin once it is complete; False if something has to wait."""
        if request.last_hidden is None:
            if not request.table.blocks and not (room.seats > 0 and self._admit(plan, request)):
                return False
            self._reuse(request)
            if request.next_key in plan.filling:
                room.seats -= 1
                return True  # an older request is just computing it
            start = request.table.num_tokens
            stop = min(start + self._chunk_tokens, len(request.prompt))
            if stop - start > room.tokens:
                return False
            chunk = PromptChunk(request, start, stop, BlockTable(list(request.table.blocks), start))
            plan.chunks.append(chunk)
            plan.filling.update(key for _, key in chunk.full_blocks())
            room.tokens -= stop - start
            if stop < len(request.prompt):
                room.seats -= 1
                return True
        self._plan_begins(plan, request, room)
        return not request.has_waiting

    def _admit(self, plan: StepPlan, request: Request) -> bool:
        """Reserve the whole prompt, leaving a block for every older sequence to grow into."""
        before = request.num_cached, request.num_prompt_done
        self._reuse(request)
        num_new = len(request.prompt) - request.table.num_tokens
        missing = self._pool.num_missing(request.table, num_new)
        if missing + self._num_running_until(request) > self._pool.num_free:
            self._pool.release(request.table)
            request.num_cached, request.num_prompt_done = before
            return False
        plan.reserve(self._pool, request.table, num_new)
        self._active[request.request_id] = self._queue.pop(request.request_id, request)
        return True

    def _reuse(self, request: Request) -> None:
        """Take over what others have computed of the prompt, from where it stands."""
        start = request.table.num_tokens
        while (key := request.next_key) is not None and self._pool.reuse(request.table, key):
            pass
        request.note_cached(start, request.table.num_tokens)

    def _plan_begins(self, plan: StepPlan, request: Request, room: _Room) -> None:
        """Let waiting sequences of a request begin; the last one takes over the prompt's blocks."""
        for sequence in request.sequences:
            if sequence.status is not Status.WAITING:
                continue
            if room.seats <= 0 or self._num_running_until(request) > self._pool.num_free:
                return  # would be preempted at once
            sequence.status = Status.RUNNING
            sequence.table = self._pool.fork(request.table, len(request.prompt))
            plan.begins.append(sequence)
            room.seats -= 1
        self._pool.release(request.table)

    def _num_running_until(self, last: Request) -> int:
        """Running sequences of the active requests up to `last`: those that it cannot preempt."""
        total = 0
        for request in self._active.values():
            total += len(request.running())
            if request is last:
                break
        return total

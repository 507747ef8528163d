"""One sequence being sampled, and the request it belongs to.

What always holds: a sequence that is preempted forgets what it has drawn and starts over. As random numbers depend on
(seed, sequence, position) and steps on a sequence alone, it draws the same tokens again, bit for bit.
"""

# P prompt tokens, D hidden

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from torch import Tensor

from jobs.operations import Sample, SampledSequence, SampleOutcome
from worker.engine.adapter import Adapter
from worker.sampler.blocks import BLOCK_TOKENS, BlockTable
from worker.sampler.prompt_scores import PromptScores
from worker.sampler.stops import StopCondition
from worker.sampler.work import WorkRate


class Status(StrEnum):
    """Where a sequence stands."""

    WAITING = "waiting"
    """For its prompt to be prefilled, for a seat, or for blocks."""
    RUNNING = "running"
    """Draws one token in every step."""
    FINISHED = "finished"


class Sequence:
    """One continuation of a request's prompt.

    Attributes:
        index: among the continuations of the request.
        tokens, logprobs: drawn so far; the last token is not in the cache yet.
        stopped: whether a stop token or string ended it.
        table: where its keys and values lie, prompt included.
    """

    def __init__(self, request: Request, index: int) -> None:
        self.request = request
        self.index = index
        self.status = Status.WAITING
        self.table = BlockTable()
        self.start_over()

    def start_over(self) -> None:
        """Forget everything drawn."""
        self.status = Status.WAITING
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.topk_tokens: list[list[int]] = []
        self.topk_logprobs: list[list[float]] = []
        self.stopped = False
        self._stop: StopCondition = self.request.make_stop()

    @property
    def num_tokens(self) -> int:
        """Prompt and drawn tokens together: the position of the next token."""
        return len(self.request.prompt) + len(self.tokens)

    def append(self, token: int, logprob: float) -> None:
        """Take the next token; the sequence is finished if it ends with it."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.stopped = self._stop.push(token)
        if self.stopped or len(self.tokens) >= self.request.num_new_max:
            self.status = Status.FINISHED

    def append_topk(self, tokens: list[int], logprobs: list[float]) -> None:
        """Take the best tokens at the position of the last one."""
        self.topk_tokens.append(tokens)
        self.topk_logprobs.append(logprobs)

    def outcome(self) -> SampledSequence:
        """What was drawn."""
        has_topk = self.request.body.topk_sample_logprobs > 0
        return SampledSequence(
            tokens=np.array(self.tokens, dtype=np.int32),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            stopped=self.stopped,
            topk_tokens=np.array(self.topk_tokens, dtype=np.int32) if has_topk else None,
            topk_logprobs=np.array(self.topk_logprobs, dtype=np.float32) if has_topk else None,
        )


@dataclass(eq=False)
class Request:
    """A `sample` operation being served.

    Attributes:
        request_id: of the operation.
        body: what was asked for.
        adapter: None samples from the base model itself.
        num_new_max: tokens after which a sequence ends.
        make_stop: a fresh stop condition.
        prompt: int64 `[P]` as a list.
        table: the prompt's keys and values while they are being computed or a sequence still waits for them.
        last_hidden: `[D]`, hidden state at the prompt's last token, from which every sequence draws its first token.
        scores: log-probabilities of the prompt, if asked for.
        rate: what its tokens cost.
        keys: of the prompt's full blocks; none if they are not shared with other requests.
        num_cached: prompt tokens found in the cache instead of computed.
        num_prompt_done, num_drawn_done: how far the request ever got; work below these marks is done again after a
            preemption, and nobody pays twice.
    """

    request_id: str
    body: Sample
    adapter: Adapter | None
    num_new_max: int
    make_stop: Callable[[], StopCondition]
    prompt: list[int]
    scores: PromptScores | None
    rate: WorkRate
    keys: tuple[bytes, ...] = ()
    table: BlockTable = field(default_factory=BlockTable)
    last_hidden: Tensor | None = None
    num_cached: int = 0
    num_prompt_done: int = 0
    num_drawn_done: list[int] = field(default_factory=list)
    sequences: list[Sequence] = field(init=False)

    def __post_init__(self) -> None:
        self.sequences = [Sequence(self, index) for index in range(self.body.num_samples)]
        self.num_drawn_done = [0] * len(self.sequences)

    @property
    def is_finished(self) -> bool:
        """Whether every sequence has ended."""
        return all(sequence.status is Status.FINISHED for sequence in self.sequences)

    @property
    def has_waiting(self) -> bool:
        """Whether a sequence has not begun."""
        return any(sequence.status is Status.WAITING for sequence in self.sequences)

    @property
    def next_key(self) -> bytes | None:
        """Of the prompt's next block, if that may be another request's.

        The last token is always computed, since its hidden state draws the first token, and so is what is scored.
        """
        place = self.table.num_tokens // BLOCK_TOKENS
        first = len(self.prompt) - 1 if self.scores is None else min(len(self.prompt) - 1, self.scores.first_row)
        return self.keys[place] if place < min(first // BLOCK_TOKENS, len(self.keys)) else None

    def note_cached(self, start: int, stop: int) -> None:
        """Prompt tokens `[start, stop)` were found in the cache."""
        self.num_cached += max(0, stop - max(start, self.num_prompt_done))
        self.num_prompt_done = max(self.num_prompt_done, stop)

    def is_new(self, sequence: Sequence) -> bool:
        """Whether the token that a sequence is about to draw was never drawn before; remembers that it is now."""
        number = len(sequence.tokens) + 1
        is_new = number > self.num_drawn_done[sequence.index]
        self.num_drawn_done[sequence.index] = max(number, self.num_drawn_done[sequence.index])
        return is_new

    @property
    def num_sampled(self) -> int:
        """Tokens in the outcome."""
        return sum(len(sequence.tokens) for sequence in self.sequences)

    def running(self) -> list[Sequence]:
        """Sequences that draw, in order."""
        return [sequence for sequence in self.sequences if sequence.status is Status.RUNNING]

    def outcome(self) -> SampleOutcome:
        """What was drawn, and what the prompt scored."""
        scores = self.scores
        return SampleOutcome(
            sequences=tuple(sequence.outcome() for sequence in self.sequences),
            prompt_logprobs=scores.logprobs if scores else None,
            topk_prompt_tokens=scores.topk_tokens if scores else None,
            topk_prompt_logprobs=scores.topk_logprobs if scores else None,
            target_prompt_logprobs=scores.target_logprobs if scores else None,
        )

"""`forward` and `forward_backward` of many runs together.

What always holds: an operation's log-probabilities and gradients do not depend on what it is packed with; a run's
gradients are the sum over its operations in order, each the sum over its chunks in order; `run` either changes all
states at its end or, if it raises, none.
"""

# T packed tokens, N rows of one chunk, K targets per row, M targets

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.operations import Failure, ForwardBackward, ForwardBackwardOutcome
from jobs.validation import InvalidOperationError, ModelFacts, check
from worker.engine.adapter import Factors
from worker.engine.attention import PackedAttention
from worker.engine.base_model import BaseModel
from worker.engine.logprobs import target_logprobs
from worker.engine.lora import Segment
from worker.engine.operation import RunningOperation
from worker.engine.packing import ROWS, Chunk, gather_targets, group, pack, split
from worker.engine.run_state import RunState
from worker.engine.timing import DeviceClock
from worker.engine.work import FORWARD, FORWARD_BACKWARD, work_units


@dataclass(frozen=True, eq=False)
class TrainRequest:
    """One operation, and the state of its run."""

    state: RunState
    body: ForwardBackward


@dataclass(frozen=True, eq=False)
class StepReport:
    """What one call did.

    Attributes:
        outcomes: one per request, in order.
        work: units per request, to split `device_ns` by; 0 for one that was refused before it ran.
        device_ns: device time of the whole call.
    """

    outcomes: list[ForwardBackwardOutcome | Failure]
    work: list[int]
    device_ns: int


class Trainer:
    """Runs operations on one base model."""

    def __init__(
        self, base_model: BaseModel, *, tokens_max: int, logprobs_chunk: int, segment_tokens: int | None = None
    ) -> None:
        """Make it.

        Args:
            base_model: shared with the sampler.
            tokens_max: rows of one pass, unless one segment is larger.
            logprobs_chunk: rows whose logits exist at once; bits depend on it.
            segment_tokens: tokens of one segment, unless one datum is larger; bits depend on it. None: `tokens_max`.
        """
        self._base_model = base_model
        self._tokens_max = tokens_max
        self._segment_tokens = segment_tokens or tokens_max
        self._align = ROWS if base_model.deterministic else 1
        self._logprobs_chunk = logprobs_chunk
        self._clock = DeviceClock(base_model.device)
        self._facts = ModelFacts(base_model.name, base_model.vocab_size, base_model.context_length)

    def run(self, requests: Sequence[TrainRequest], *, on_pass: Callable[[], None] = lambda: None) -> StepReport:
        """Run operations of any runs; gradients of those that succeed are added to their runs' accumulators.

        Args:
            requests: those of one run in `seq` order.
            on_pass: called before each pass through the base model: a sign of life for the watchdog.

        Returns:
            An outcome for each. One whose data are malformed, or whose loss or gradients are not finite, fails alone
            and contributes nothing.
        """
        with self._clock.measure() as measurement:
            operations = [RunningOperation(request.body, self._fault(request.body)) for request in requests]
            for training in (False, True):
                chunks = [
                    chunk
                    for index, (request, operation) in enumerate(zip(requests, operations, strict=True))
                    if operation.failure is None and request.body.forward_only is not training
                    for chunk in split(index, request.body.data, tokens_max=self._segment_tokens, align=self._align)
                ]
                for together in group(chunks, tokens_max=self._tokens_max):
                    on_pass()
                    self._pass(together, requests, operations, training=training)
            outcomes = [operation.outcome() for operation in operations]
            self._accumulate(requests, operations)
        return StepReport(
            outcomes,
            [self._work(request, o) for request, o in zip(requests, operations, strict=True)],
            measurement.device_ns,
        )

    def _fault(self, body: ForwardBackward) -> Failure | None:
        """Why the operation cannot run: it was checked when it was accepted, but one bad index would end the pass."""
        try:
            check(body, self._facts)
        except InvalidOperationError as error:
            return Failure(str(error))
        return None

    def _pass(
        self,
        chunks: Sequence[Chunk],
        requests: Sequence[TrainRequest],
        operations: Sequence[RunningOperation],
        *,
        training: bool,
    ) -> None:
        """Run some chunks together, and hand each operation its results."""
        device = self._base_model.device
        batch = pack(chunks, device)
        segments = [
            self._segment(requests[chunk.operation].state, span, training=training)
            for chunk, span in zip(chunks, batch.spans, strict=True)
        ]
        targets = [gather_targets(chunk, operations[chunk.operation].defaults, device) for chunk in chunks]
        with torch.set_grad_enabled(training):
            hidden_TD = self._base_model.hidden(
                batch.tokens,
                batch.positions,
                segments=segments,
                attention=PackedAttention(batch.sequences, batch.num_rows),
            )
            parts = torch.split(hidden_TD, [chunk.num_rows for chunk in chunks])
            logprobs = [
                target_logprobs(
                    self._base_model, part[: chunk.num_tokens], target.token_ids, segment, chunk=self._logprobs_chunk
                )
                for part, chunk, target, segment in zip(parts, chunks, targets, segments, strict=True)
            ]
        gradients = [
            operations[chunk.operation].evaluate(chunk, target, logprobs_NK.detach())
            for chunk, target, logprobs_NK in zip(chunks, targets, logprobs, strict=True)
        ]
        if training:
            torch.autograd.backward(logprobs, gradients)
            for chunk, segment in zip(chunks, segments, strict=True):
                assert segment.gradients is not None
                operations[chunk.operation].add_gradients(segment.gradients)

    def _segment(self, state: RunState, span: tuple[int, int], *, training: bool) -> Segment:
        gradients = Factors.zeros(state.adapter.layout, self._base_model.device) if training else None
        return Segment(*span, adapter=state.adapter, gradients=gradients)

    def _accumulate(self, requests: Sequence[TrainRequest], operations: Sequence[RunningOperation]) -> None:
        """Add the gradients of what succeeded, in order."""
        for request, operation in zip(requests, operations, strict=True):
            gradients: Tensor | None = operation.gradients
            if operation.failure is None and gradients is not None:
                request.state.gradients.flat.add_(gradients)
                request.state.num_accumulated += 1

    def _work(self, request: TrainRequest, operation: RunningOperation) -> int:
        if not operation.ran:
            return 0
        factor = FORWARD if request.body.forward_only else FORWARD_BACKWARD
        spans = [(len(datum.tokens), 0) for datum in request.body.data]
        return work_units(self._base_model, request.state.adapter, spans, factor=factor)

"""`Sampler.step()`: schedule, run, pick tokens, finish.

What always holds: what a request gets depends on its body, its adapter and the base model alone (on CPU bit for bit);
company changes only when it gets it.
"""

# T packed tokens, D hidden, V vocabulary

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from jobs.operations import Category, Failure, Sample
from worker.engine.adapter import Adapter
from worker.engine.base_model import BaseModel
from worker.engine.timing import DeviceClock
from worker.sampler.admission import find_refusal, num_new_max
from worker.sampler.blocks import BLOCK_TOKENS, BlockPool, block_keys
from worker.sampler.head import drawing_logits, score_prompt
from worker.sampler.kv_cache import KVCache
from worker.sampler.philox import uniforms
from worker.sampler.picking import Draw, pick
from worker.sampler.prompt_scores import make_prompt_scores
from worker.sampler.reports import Finished, SamplerStep
from worker.sampler.scheduler import PromptChunk, Scheduler, StepPlan
from worker.sampler.sequence import Request, Sequence, Status
from worker.sampler.step_batch import ROW_TILE, StepBatch, pack_step
from worker.sampler.stops import make_decode, make_stop
from worker.sampler.work import WorkRate

CHUNK_TOKENS = 1024
"""Most prompt tokens of one request computed in one step."""


class Sampler:
    """Samples many requests together, each step one token for every running sequence."""

    def __init__(
        self, base_model: BaseModel, tokenizer: Any, *, kv_tokens_max: int, sequences_max: int, tokens_max: int
    ) -> None:
        """Set the cache's memory aside.

        Args:
            base_model: shared with training.
            tokenizer: of `transformers` or `tokenizers`; None refuses stop strings.
            kv_tokens_max: tokens whose keys and values are kept.
            sequences_max: sequences that draw in one step.
            tokens_max: prompt tokens prefilled in one step.
        """
        self._base_model = base_model
        self._decode = make_decode(tokenizer)
        pool = BlockPool(max(1, kv_tokens_max // BLOCK_TOKENS))
        self._cache_tokens = pool.num_blocks * BLOCK_TOKENS
        self._cache = KVCache(
            base_model.config, num_blocks=pool.num_blocks, device=base_model.device, dtype=base_model.dtype
        )
        chunk_tokens = max(1, min(CHUNK_TOKENS, tokens_max) // BLOCK_TOKENS) * BLOCK_TOKENS
        self._scheduler = Scheduler(pool, sequences_max=sequences_max, tokens_max=tokens_max, chunk_tokens=chunk_tokens)
        self._row_tile = ROW_TILE if base_model.deterministic else 1
        self._grid = BLOCK_TOKENS if base_model.deterministic else chunk_tokens
        self._clock = DeviceClock(base_model.device)
        self._refused: list[Finished] = []

    @property
    def has_work(self) -> bool:
        """Whether another step has something to do."""
        return bool(self._refused) or self._scheduler.has_work

    def submit(self, request_id: str, body: Sample, adapter: Adapter | None, *, scope: str | None = None) -> None:
        """Queue a request; one that cannot be served is reported as failed by the next step.

        Args:
            request_id: unused so far, or finished.
            body: what to sample.
            adapter: must not change until the request is finished; None is the base model itself.
            scope: requests of one scope share the keys and values of common prompt beginnings; it must name whose they
                are and the adapter, whose weights never change. None shares nothing.
        """
        if self._scheduler.find(request_id) is not None:
            raise ValueError(f"request {request_id} is being sampled already; cancel it first")
        refusal = find_refusal(
            body,
            vocab_size=self._base_model.vocab_size,
            context_length=self._base_model.context_length,
            cache_tokens=self._cache_tokens,
            has_tokenizer=self._decode is not None,
        )
        if refusal is not None:
            self._refused.append(Finished(request_id, refusal))
        else:
            self._scheduler.add(self._make_request(request_id, body, adapter, scope))

    def is_waiting(self, request_id: str) -> bool:
        """Whether a request was submitted, and nothing of it has been computed so far."""
        return self._scheduler.is_waiting(request_id)

    def cancel(self, request_id: str) -> None:
        """Drop a request and what it holds, without an outcome; an unknown or finished one is ignored."""
        self._refused = [refused for refused in self._refused if refused.request_id != request_id]
        request = self._scheduler.find(request_id)
        if request is not None:
            self._scheduler.remove(request)

    def step(self) -> SamplerStep:
        """Prefill, draw one token for every running sequence, and report who is finished.

        If it raises (out of memory, say), cancel every request before the next step.
        """
        step = SamplerStep(finished=self._refused)
        self._refused = []
        if not self._scheduler.has_work:
            return step
        with self._clock.measure() as measured, torch.inference_mode():
            self._advance(step)
        step.device_ns = measured.device_ns
        return step

    def _make_request(self, request_id: str, body: Sample, adapter: Adapter | None, scope: str | None) -> Request:
        prompt = [int(token) for token in body.prompt]
        stop = partial(
            make_stop,
            body.params.stop,
            eos_token_ids=self._base_model.eos_token_ids,
            decode=self._decode,
            prompt=prompt,
        )
        rate = WorkRate(self._base_model, adapter)
        limit = num_new_max(body, context_length=self._base_model.context_length, cache_tokens=self._cache_tokens)
        keys = tuple(block_keys(scope, prompt)) if scope is not None else ()
        return Request(request_id, body, adapter, limit, stop, prompt, make_prompt_scores(body), rate, keys)

    def _advance(self, step: SamplerStep) -> None:
        plan = self._scheduler.plan()
        self._cache.prepare(plan.reserved)
        batch = pack_step(plan.chunks, plan.decodes, scratch_slot=self._cache.scratch_slot, row_tile=self._row_tile)
        hidden_TD = self._forward(batch) if batch.tokens else None
        self._count_work(step, plan)
        failed: dict[Request, int] = {}
        if hidden_TD is not None:
            for chunk, row in batch.chunk_rows.items():
                self._take_chunk(chunk, hidden_TD[row : row + chunk.stop - chunk.start], failed)
        for sequence in plan.decodes:
            sequence.table.num_tokens += 1
        drawing = [sequence for sequence in plan.decodes + plan.begins if sequence.request not in failed]
        if drawing:
            self._draw(drawing, hidden_TD, batch, failed)
        for request in dict.fromkeys([*failed, *(sequence.request for sequence in drawing)]):
            self._settle(step, request, failed.get(request))

    def _forward(self, batch: StepBatch) -> Tensor:
        tokens_T, positions_T = batch.tensors(self._base_model.device)
        return self._base_model.hidden(
            tokens_T, positions_T, segments=batch.segments, attention=batch.attention(self._cache, grid=self._grid)
        )

    def _take_chunk(self, chunk: PromptChunk, hidden_ND: Tensor, failed: dict[Request, int]) -> None:
        """Score a chunk of a prompt and remember how far the prompt is."""
        request = chunk.request
        if request.table.blocks:
            request.table.num_tokens = chunk.stop
        self._scheduler.publish(chunk)
        if chunk.is_last:
            request.last_hidden = hidden_ND[-1].clone()
        if request.scores is not None and not score_prompt(
            self._base_model,
            hidden_ND,
            first=chunk.start,
            scores=request.scores,
            adapter=request.adapter,
            row_tile=self._row_tile,
        ):
            failed[request] = chunk.start

    def _draw(
        self, drawing: list[Sequence], hidden_TD: Tensor | None, batch: StepBatch, failed: dict[Request, int]
    ) -> None:
        """Draw one token for each of the sequences."""
        logits_NV = drawing_logits(self._base_model, hidden_TD, batch, drawing, self._row_tile)
        picked = pick(logits_NV, _draws(drawing))
        tokens, logprobs, finite = picked.tokens.tolist(), picked.logprobs.tolist(), picked.finite.tolist()
        for row, sequence in enumerate(drawing):
            if not finite[row]:
                failed.setdefault(sequence.request, sequence.num_tokens)
                continue
            sequence.append(tokens[row], logprobs[row])
            if row in picked.topk:
                sequence.append_topk(*picked.topk[row])
            if sequence.status is Status.FINISHED:
                self._scheduler.finish(sequence)

    def _settle(self, step: SamplerStep, request: Request, failed_at: int | None) -> None:
        """Report a request that is finished or has failed, and forget it."""
        if not request.has_waiting:
            request.last_hidden = None
        if failed_at is not None:
            step.finished.append(Finished(request.request_id, _not_finite(request, failed_at)))
        elif request.is_finished:
            step.finished.append(
                Finished(
                    request.request_id,
                    request.outcome(),
                    tokens_prefilled=len(request.prompt) - request.num_cached,
                    tokens_cached=request.num_cached,
                    tokens_sampled=request.num_sampled,
                )
            )
        else:
            return
        self._scheduler.remove(request)

    def _count_work(self, step: SamplerStep, plan: StepPlan) -> None:
        """Units of every request in the step; what a preemption had dropped is overhead."""
        for chunk in plan.chunks:
            request = chunk.request
            step.add_work(
                request, request.rate.tokens(chunk.start, chunk.stop), again=chunk.stop <= request.num_prompt_done
            )
            request.num_prompt_done = max(request.num_prompt_done, chunk.stop)
        for sequence in plan.decodes:
            again = not sequence.request.is_new(sequence)
            position = sequence.table.num_tokens
            step.add_work(sequence.request, sequence.request.rate.tokens(position, position + 1), again=again)
        for sequence in plan.begins:
            again = not sequence.request.is_new(sequence)
            step.add_work(sequence.request, sequence.request.rate.per_head_row, again=again)


def _draws(drawing: list[Sequence]) -> list[Draw]:
    """How each sequence's next token is drawn."""
    randoms = uniforms(
        [sequence.request.body.params.seed for sequence in drawing],
        [sequence.index for sequence in drawing],
        [sequence.num_tokens for sequence in drawing],
    ).tolist()
    draws = []
    for sequence, uniform in zip(drawing, randoms, strict=True):
        body, params = sequence.request.body, sequence.request.body.params
        draws.append(Draw(params.temperature, params.top_k, params.top_p, body.topk_sample_logprobs, uniform))
    return draws


def _not_finite(request: Request, position: int) -> Failure:
    whose = "the base model" if request.adapter is None else "these weights"
    return Failure(
        f"{whose} give no usable numbers (NaN or infinity) from position {position} on; if training has diverged, "
        "sample from an earlier checkpoint",
        Category.SERVER,
    )

"""From hidden states to logits: of the rows that draw a token, and of prompts that are scored, in pieces.

What always holds: logits of more than `SCORED_ROWS` prompt rows never exist at once.
"""

# T packed tokens, K kept hidden states, N rows, D hidden, V vocabulary

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.engine.adapter import Adapter
from worker.engine.base_model import BaseModel
from worker.engine.lora import Segment
from worker.sampler import sequence
from worker.sampler.prompt_scores import PromptScores
from worker.sampler.step_batch import StepBatch, by_adapter

SCORED_ROWS = 256
"""Prompt rows whose logits exist at once."""


def drawing_logits(
    base_model: BaseModel,
    hidden_TD: Tensor | None,
    batch: StepBatch,
    drawing: Sequence[sequence.Sequence],
    row_tile: int,
) -> Tensor:
    """Logits from which each sequence draws its next token.

    Sequences that draw their first token share one row per request.

    Args:
        hidden_TD: of the step's pass; None if there was none.
        batch: says which row is whose.
        drawing: sequences of `batch.decode_rows`, and others whose request knows its last hidden state.
        row_tile: rows of a segment are padded to a multiple of this.

    Returns:
        fp32 `[N, V]`, one row per sequence; rows behind them are padding.
    """
    sources, kept = _sources(batch, drawing, 0 if hidden_TD is None else hidden_TD.shape[0])
    parts = [part for part in (hidden_TD, torch.stack(kept) if kept else None) if part is not None]
    rows: list[int] = []
    place: dict[int, int] = {}
    segments = []
    for adapter, members in by_adapter(drawing, lambda item: item.request.adapter):
        start = len(rows)
        for source in dict.fromkeys(sources[member] for member in members):
            place[source] = len(rows)
            rows.append(source)
        rows += [rows[-1]] * (-(len(rows) - start) % row_tile)
        segments.append(Segment(start, len(rows), adapter))
    hidden_ND = torch.cat(parts)[torch.tensor(rows).to(base_model.device)]
    logits_NV = base_model.logits(hidden_ND, segments)
    order = [place[sources[member]] for member in drawing]
    if order == list(range(len(order))):
        return logits_NV
    return logits_NV[torch.tensor(order).to(base_model.device)]


def score_prompt(
    base_model: BaseModel,
    hidden_ND: Tensor,
    *,
    first: int,
    scores: PromptScores,
    adapter: Adapter | None,
    row_tile: int,
) -> bool:
    """Score the prompt tokens behind the rows of one chunk.

    Args:
        hidden_ND: of the chunk.
        first: position of the chunk's first token.
        scores: takes what it wants.
        adapter: of the request.
        row_tile: rows are padded to a multiple of this.

    Returns:
        Whether all logits were usable numbers.
    """
    wanted = scores.rows_wanted(first, first + hidden_ND.shape[0])
    for start in range(wanted.start, wanted.stop, SCORED_ROWS):
        num_rows = min(SCORED_ROWS, wanted.stop - start)
        piece_ND = hidden_ND[start - first : start - first + num_rows]
        padded_ND = torch.cat([piece_ND, piece_ND[:1].expand(-num_rows % row_tile, -1)])
        logits_NV = base_model.logits(padded_ND, [Segment(0, padded_ND.shape[0], adapter)])[:num_rows]
        if not bool(torch.isfinite(logits_NV.amax(-1)).all()):
            return False
        scores.add(start, torch.log_softmax(logits_NV, dim=-1))
    return True


def _sources(
    batch: StepBatch, drawing: Sequence[sequence.Sequence], num_rows: int
) -> tuple[dict[sequence.Sequence, int], list[Tensor]]:
    """Where each sequence's hidden state is: a row of the pass, or one of those kept, which come behind."""
    sources: dict[sequence.Sequence, int] = {}
    kept: list[Tensor] = []
    place: dict[str, int] = {}
    for member in drawing:
        if member in batch.decode_rows:
            sources[member] = batch.decode_rows[member]
            continue
        request = member.request
        if request.request_id not in place:
            assert request.last_hidden is not None, "a sequence begins when its prompt is complete"
            place[request.request_id] = num_rows + len(kept)
            kept.append(request.last_hidden)
        sources[member] = place[request.request_id]
    return sources, kept

"""Log-probabilities of targets, in chunks of rows: `[T, V]` never exists.

The backward pass computes each chunk's logits again. Chunks are cut within one segment, so that their shapes, and with
them every bit, depend on that segment alone.
"""

# N rows of one segment, K targets per row, C rows of one chunk, D hidden, V vocabulary

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from worker.engine.base_model import BaseModel
from worker.engine.lora import Delta, Segment


def target_logprobs(
    base_model: BaseModel, hidden_ND: Tensor, targets_NK: Tensor, segment: Segment, *, chunk: int
) -> Tensor:
    """Log-probabilities of each row's targets, fp32 `[N, K]`.

    With gradients enabled, the backward pass adds those of the output projection's adapter to the segment's buffers.

    Args:
        base_model: whose output projection is used.
        hidden_ND: the segment's rows of what `BaseModel.hidden` returned.
        targets_NK: int64 token ids.
        segment: says which adapter; its place in the packed batch is of no consequence here.
        chunk: rows whose logits exist at once.
    """
    head = _Head(base_model, segment, chunk)
    logprobs_NK: Tensor = _TargetLogprobs.apply(hidden_ND, targets_NK, head)  # type: ignore[no-untyped-call]
    return logprobs_NK


@dataclass(frozen=True, eq=False)
class _Head:
    """The output projection as one segment's adapter changes it."""

    base_model: BaseModel
    segment: Segment
    chunk: int

    def chunks(self, num_rows: int) -> Iterator[slice]:
        for start in range(0, num_rows, self.chunk):
            yield slice(start, min(start + self.chunk, num_rows))

    def forward(self, hidden_CD: Tensor) -> tuple[Tensor, Delta | None, Tensor | None]:
        logits_CV = self.base_model.products.frozen(hidden_CD, self.base_model.head_weight.t()).float()
        segment = replace(self.segment, start=0, stop=hidden_CD.shape[0])
        delta = Delta.of_segment(segment, self.base_model.head_site, self.base_model.products)
        return logits_CV, delta, delta.add(logits_CV, hidden_CD) if delta is not None else None


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, targets_NK: Tensor, head: _Head) -> Tensor:
        ctx.save_for_backward(hidden_ND, targets_NK)
        ctx.head = head
        parts = []
        for rows in head.chunks(hidden_ND.shape[0]):
            logits_CV, _, _ = head.forward(hidden_ND[rows])
            parts.append(torch.log_softmax(logits_CV, dim=-1).gather(1, targets_NK[rows]))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        hidden_ND, targets_NK = ctx.saved_tensors
        head: _Head = ctx.head
        parts = []
        for rows in head.chunks(hidden_ND.shape[0]):
            grad_CK, hidden_CD = grads[0][rows], hidden_ND[rows]
            logits_CV, delta, low_CR = head.forward(hidden_CD)
            # ∂ℓ_k/∂logits = onehot(target_k) − softmax
            dlogits_CV = torch.softmax(logits_CV, dim=-1).mul_(-grad_CK.sum(1, keepdim=True))
            dlogits_CV.scatter_add_(1, targets_NK[rows], grad_CK)
            dhidden_CD = head.base_model.products.frozen(dlogits_CV.to(hidden_CD.dtype), head.base_model.head_weight)
            if delta is not None and low_CR is not None:
                delta.add_backward(dhidden_CD, dlogits_CV, hidden_CD, low_CR)
            parts.append(dhidden_CD)
        return torch.cat(parts), None, None

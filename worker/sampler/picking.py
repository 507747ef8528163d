"""From logits and one uniform to a token: temperature, top-k, top-p, and what the token's log-probability is.

What always holds: a row's result depends on its own logits, uniform and options only. Candidates are ordered by token
id, and of tokens with equal logits at the edge of a truncation the lower ids are kept.
"""

# N rows, V vocabulary, W best candidates, K best tokens asked for

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_CANDIDATES = 1024
"""So many best tokens usually decide a truncation; the whole vocabulary is sorted only where they do not."""


@dataclass(frozen=True)
class Draw:
    """How one token is drawn.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep the k best tokens; below 1 is off.
        top_p: then keep the fewest best tokens that have this share of what is left; 1 is off.
        topk: best tokens to report; 0 is none.
        uniform: the random number in [0, 1).
    """

    temperature: float
    top_k: int
    top_p: float
    topk: int
    uniform: float

    @property
    def is_truncated(self) -> bool:
        """Whether top-k or top-p take tokens away."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


@dataclass(frozen=True, eq=False)
class Picked:
    """One token per row.

    Attributes:
        tokens: int64 `[N]`.
        logprobs: float32 `[N]`, under log softmax(logits / T) whatever the truncation; at T = 0 of the model itself.
        finite: bool `[N]`; False where the logits hold no usable numbers, and the token means nothing.
        topk: row → int64 and float32 `[K]`, best first, where asked for.
    """

    tokens: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    finite: npt.NDArray[np.bool_]
    topk: dict[int, tuple[list[int], list[float]]]


def pick(logits_NV: Tensor, draws: Sequence[Draw]) -> Picked:
    """Draw one token per row.

    Args:
        logits_NV: fp32.
        draws: one per row, or fewer: rows behind them are padding.
    """
    num_rows = len(draws)
    highest_N1 = logits_NV.amax(-1, keepdim=True)
    temperatures = [draw.temperature if draw.temperature > 0 else 1.0 for draw in draws]
    temperatures += [1.0] * (logits_NV.shape[0] - num_rows)
    scaled_NV = logits_NV - highest_N1
    if any(temperature != 1.0 for temperature in temperatures):
        scaled_NV /= torch.tensor(temperatures, device=logits_NV.device).clamp(min=1e-10)[:, None]
    logprobs_NV = torch.log_softmax(scaled_NV, dim=-1)
    tokens_N = torch.zeros(num_rows, dtype=torch.int64, device=logits_NV.device)
    greedy = [row for row, draw in enumerate(draws) if draw.temperature <= 0]
    drawn = [row for row, draw in enumerate(draws) if draw.temperature > 0]
    if greedy:
        tokens_N[greedy] = _rows(logits_NV, greedy).argmax(-1)
    if drawn:
        tokens_N[drawn] = _draw(_rows(logprobs_NV, drawn), [draws[row] for row in drawn])
    chosen_N = logprobs_NV[:num_rows].gather(1, tokens_N[:, None])[:, 0]
    return Picked(
        tokens=tokens_N.cpu().numpy(),
        logprobs=chosen_N.cpu().numpy(),
        finite=torch.isfinite(highest_N1[:num_rows, 0]).cpu().numpy(),
        topk=_topk(logprobs_NV, [draw.topk for draw in draws]),
    )


def _rows(values_NV: Tensor, rows: list[int]) -> Tensor:
    """The rows of these indices (ascending); no copy if they are the first ones."""
    if rows[-1] == len(rows) - 1:
        return values_NV[: len(rows)]
    return values_NV[rows]


def _draw(logprobs_NV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The first token, by id, up to which the probabilities add up to more than `uniform` of the whole."""
    probs_NV = torch.softmax(logprobs_NV.double(), -1)  # row by row; `exp` treats the ends of a tensor differently
    truncated = [row for row, draw in enumerate(draws) if draw.is_truncated]
    if truncated:
        kept_NV = _kept(_rows(logprobs_NV, truncated), [draws[row] for row in truncated])
        probs_NV[truncated] *= kept_NV
    cumulative_NV = probs_NV.cumsum_(-1)
    total_N1 = cumulative_NV[:, -1:].contiguous()
    uniform_N1 = torch.tensor([[draw.uniform] for draw in draws], dtype=torch.float64, device=logprobs_NV.device)
    chosen_N1 = torch.searchsorted(cumulative_NV, uniform_N1 * total_N1, right=True)
    last_N1 = torch.searchsorted(cumulative_NV, total_N1)  # the last token with any probability
    tokens_N: Tensor = torch.minimum(chosen_N1, last_N1)[:, 0].clamp_(max=logprobs_NV.shape[1] - 1)
    return tokens_N


def _kept(logprobs_NV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Which tokens a truncation keeps: the best ones, of equal ones those with lower ids."""
    vocab_size = logprobs_NV.shape[1]
    top_k_N1 = torch.tensor([[draw.top_k if draw.top_k > 0 else vocab_size] for draw in draws])
    top_p_N1 = torch.tensor([[draw.top_p] for draw in draws], dtype=torch.float64)
    top_k_N1, top_p_N1 = top_k_N1.clamp_(max=vocab_size).to(logprobs_NV.device), top_p_N1.to(logprobs_NV.device)
    width = min(vocab_size, _CANDIDATES)
    best_NW = torch.topk(logprobs_NV, width).values
    num_kept_N1 = _num_kept(best_NW, top_k_N1, top_p_N1, vocab_size)
    edge_N1 = best_NW.gather(1, num_kept_N1 - 1)
    undecided_N1 = (top_k_N1 > width) & ((num_kept_N1 == width) | (top_k_N1 < vocab_size))
    for row in undecided_N1.nonzero()[:, 0].tolist():
        here = slice(row, row + 1)
        sorted_1V = logprobs_NV[here].sort(-1, descending=True).values
        num_kept_N1[here] = _num_kept(sorted_1V, top_k_N1[here], top_p_N1[here], vocab_size)
        edge_N1[here] = sorted_1V.gather(1, num_kept_N1[here] - 1)
    above_NV, equal_NV = logprobs_NV > edge_N1, logprobs_NV == edge_N1
    room_N1 = num_kept_N1 - above_NV.sum(-1, keepdim=True)
    return above_NV | (equal_NV & (equal_NV.cumsum(-1) <= room_N1))


def _num_kept(sorted_NW: Tensor, top_k_N1: Tensor, top_p_N1: Tensor, vocab_size: int) -> Tensor:
    """How many of the best tokens stay: top-k first, then top-p of what top-k left; at least one."""
    width = sorted_NW.shape[1]
    rank_W = torch.arange(width, device=sorted_NW.device)
    probs_NW = sorted_NW.double().exp_() * (rank_W < top_k_N1)
    cumulative_NW = probs_NW.cumsum(-1)
    whole_N1 = torch.where(top_k_N1 < vocab_size, cumulative_NW[:, -1:], torch.ones_like(top_p_N1))
    before_NW = cumulative_NW - probs_NW
    inside_NW = (before_NW < top_p_N1 * whole_N1) | (top_p_N1 >= 1)
    return (inside_NW & (rank_W < top_k_N1)).sum(-1, keepdim=True).clamp_(min=1)


def _topk(logprobs_NV: Tensor, counts: Sequence[int]) -> dict[int, tuple[list[int], list[float]]]:
    """The best tokens of the rows that want any."""
    found = {}
    for count in sorted(set(counts) - {0}):
        rows = [row for row, wanted in enumerate(counts) if wanted == count]
        best = torch.topk(logprobs_NV[rows], count)
        for row, tokens, logprobs in zip(rows, best.indices.tolist(), best.values.tolist(), strict=True):
            found[row] = (tokens, logprobs)
    return found

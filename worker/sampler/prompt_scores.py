"""Log-probabilities of a prompt's own tokens, gathered while it is prefilled.

What always holds: they are at temperature 1, and row r of the model scores position r + 1, so position 0 never has one.
"""

# P prompt tokens, C rows of one chunk, V vocabulary, K best or target tokens

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from jobs.operations import Array, Sample

UNSCORED_TOPK_LOGPROB = -99999.0
"""Stands, with token 0, where a prompt position has no best tokens."""


class PromptScores:
    """Everything a request wants to know about its prompt."""

    def __init__(self, body: Sample) -> None:
        num_tokens = len(body.prompt)
        last_n = body.prompt_logprobs_last_n
        self._prompt_P = torch.from_numpy(np.array(body.prompt, dtype=np.int64))
        self._first_row = 0 if last_n is None else max(0, num_tokens - last_n - 1)
        self._last_row = num_tokens - 1
        self._topk = body.topk_prompt_logprobs
        self._targets: Tensor | None = None
        self.logprobs: Array | None = None
        self.topk_tokens: Array | None = None
        self.topk_logprobs: Array | None = None
        self.target_logprobs: Array | None = None
        if body.prompt_logprobs:
            self.logprobs = np.full(num_tokens, np.nan, dtype=np.float32)
        if self._topk:
            self.topk_tokens = np.zeros((num_tokens, self._topk), dtype=np.int32)
            self.topk_logprobs = np.full((num_tokens, self._topk), UNSCORED_TOPK_LOGPROB, dtype=np.float32)
        if body.target_prompt_logprobs is not None:
            self._targets = torch.from_numpy(np.array(body.target_prompt_logprobs, dtype=np.int64))
            self.target_logprobs = np.zeros(tuple(self._targets.shape), dtype=np.float32)

    @property
    def first_row(self) -> int:
        """The first row whose logits are needed."""
        return 0 if self._targets is not None else self._first_row

    def rows_wanted(self, start: int, stop: int) -> range:
        """Rows among the prompt's `[start, stop)` whose logits are needed."""
        first = max(start, self.first_row)
        return range(first, max(first, min(stop, self._last_row)))

    def add(self, row: int, logprobs_CV: Tensor) -> None:
        """Take the log-probabilities that the rows from `row` on give to the whole vocabulary, on any device."""
        num_rows = logprobs_CV.shape[0]
        skipped = max(0, self._first_row - row)
        scored_CV = logprobs_CV[skipped:]
        positions = slice(row + 1 + skipped, row + 1 + num_rows)
        if self.logprobs is not None:
            tokens_C = self._prompt_P[positions].to(logprobs_CV.device)
            self.logprobs[positions] = scored_CV.gather(1, tokens_C[:, None])[:, 0].cpu().numpy()
        if self.topk_tokens is not None and self.topk_logprobs is not None:
            best = torch.topk(scored_CV, self._topk)
            self.topk_tokens[positions] = best.indices.cpu().numpy()
            self.topk_logprobs[positions] = best.values.cpu().numpy()
        if self._targets is not None and self.target_logprobs is not None:
            targets_CK = self._targets[row : row + num_rows]
            values_CK = logprobs_CV.gather(1, targets_CK.clamp(min=0).to(logprobs_CV.device)).cpu()
            values_CK[targets_CK < 0] = 0.0
            self.target_logprobs[row : row + num_rows] = values_CK.numpy()


def make_prompt_scores(body: Sample) -> PromptScores | None:
    """Scores of a request's prompt, or None if it wants none."""
    wanted = body.prompt_logprobs or body.topk_prompt_logprobs or body.target_prompt_logprobs is not None
    return PromptScores(body) if wanted else None

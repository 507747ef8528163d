"""How far a replayed outcome lies from the one on record.

On CPU there is no distance: every bit is the same. On CUDA kernels may add in another order, so that the numbers differ
by rounding; what is more than that is a defect, or damage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from jobs import operations
from jobs.operations import ForwardBackwardOutcome, OptimStepOutcome, Outcome


def distance(replayed: Outcome, recorded: Outcome | None) -> float:
    """0 if they are the same bit for bit; infinite if they are not of the same form, or nothing is on record.

    Otherwise the largest of: the root mean square of the log-probabilities' differences; the difference of each sum
    (`loss:sum`) per target; the difference of each other metric relative to `1 + |recorded|`.
    """
    if recorded is None:
        return math.inf
    if operations.encode(replayed) == operations.encode(recorded):
        return 0.0
    if isinstance(replayed, OptimStepOutcome) and isinstance(recorded, OptimStepOutcome):
        return _of_metrics(replayed.metrics, recorded.metrics, num_targets=1)
    if isinstance(replayed, ForwardBackwardOutcome) and isinstance(recorded, ForwardBackwardOutcome):
        return _of_passes(replayed, recorded)
    return math.inf


def _of_passes(replayed: ForwardBackwardOutcome, recorded: ForwardBackwardOutcome) -> float:
    if [one.shape for one in replayed.logprobs] != [one.shape for one in recorded.logprobs]:
        return math.inf
    differences = [
        np.subtract(one, other, dtype=np.float64).reshape(-1)
        for one, other in zip(replayed.logprobs, recorded.logprobs, strict=True)
    ]
    squares = np.square(np.concatenate(differences))
    of_logprobs = math.sqrt(float(squares.mean())) if squares.size else 0.0
    return _largest(of_logprobs, _of_metrics(replayed.metrics, recorded.metrics, num_targets=max(1, squares.size)))


def _of_metrics(replayed: Mapping[str, float], recorded: Mapping[str, float], *, num_targets: int) -> float:
    if replayed.keys() != recorded.keys():
        return math.inf
    distances = []
    for name, value in recorded.items():
        scale = num_targets if name.endswith(":sum") else 1 + abs(value)
        distances.append(abs(replayed[name] - value) / scale)
    return _largest(*distances)


def _largest(*distances: float) -> float:
    """NaN is as far away as can be."""
    return max((math.inf if math.isnan(one) else one for one in distances), default=0.0)

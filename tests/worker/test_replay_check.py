"""What was computed again is told from what is on record: by every bit, and by how much."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jobs.operations import Failure, ForwardBackwardOutcome, OptimStepOutcome, Outcome
from worker.replay_check import distance

LOGPROBS = (np.array([-1.0, -2.0], np.float32), np.array([[-0.5, -3.0]], np.float32))


def passes(logprobs: tuple[Any, ...] = LOGPROBS, **metrics: float) -> ForwardBackwardOutcome:
    return ForwardBackwardOutcome(logprobs, {"loss:sum": 6.5, "ratio:mean": 1.0, **metrics})


def test_the_same_bits_have_no_distance() -> None:
    assert distance(passes(), passes()) == 0
    nan = OptimStepOutcome({"grad_norm": math.nan})
    assert distance(nan, nan) == 0


def test_a_single_other_bit_is_seen() -> None:
    other = (np.nextafter(LOGPROBS[0], np.float32(0)), LOGPROBS[1])
    assert 0 < distance(passes(other), passes()) < 1e-6


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda: passes((LOGPROBS[0] + np.float32(0.5), LOGPROBS[1])), math.sqrt(2 * 0.25 / 4)),
        (lambda: passes(**{"loss:sum": 6.9}), 0.4 / 4),
        (lambda: passes(**{"ratio:mean": 1.5}), 0.5 / 2),
        (lambda: passes(**{"ratio:mean": math.nan}), math.inf),
        (lambda: passes(**{"new:mean": 0.0}), math.inf),
        (lambda: passes(LOGPROBS[:1]), math.inf),
        (lambda: Failure("it fails now"), math.inf),
        (lambda: OptimStepOutcome({}), math.inf),
    ],
    ids=["log-probabilities", "sum per target", "relative", "not a number", "metrics", "shapes", "failure", "kind"],
)
def test_the_distance_says_how_much_is_off(change: Callable[[], Outcome], expected: float) -> None:
    assert distance(change(), passes()) == pytest.approx(expected, rel=1e-6)


def test_what_is_on_record_no_more_cannot_be_confirmed() -> None:
    assert distance(passes(), None) == math.inf

"""One `forward` or `forward_backward` while its chunks go through their passes."""

# N rows of one chunk, K targets per row, M targets

from __future__ import annotations

import torch
from torch import Tensor

from jobs.operations import Array, Failure, ForwardBackward, ForwardBackwardOutcome
from worker.engine.adapter import Factors
from worker.engine.losses import LOSSES, LossTerms
from worker.engine.packing import Chunk, Targets

_WEIGHT_IF_ABSENT = 1.0


class RunningOperation:
    """Collects what the chunks of one operation give.

    Attributes:
        failure: why it fails; None as long as nothing is wrong.
        ran: whether any of it was computed.
        gradients: flat sum over its chunks so far; None before the first.
        defaults: what stands in for an optional input that a datum lacks.
    """

    def __init__(self, body: ForwardBackward, failure: Failure | None) -> None:
        """Begin; with a failure, it is over already."""
        self.failure = failure
        self.ran = False
        self.gradients: Tensor | None = None
        self._body = body
        self._loss_sum = 0.0
        self._averages: dict[str, tuple[float, int]] = {}
        self._logprobs: list[Array] = []
        self.defaults: dict[str, float] = {"weights": _WEIGHT_IF_ABSENT}
        self._config: dict[str, float] = {}
        if failure is None:
            self._loss = LOSSES[body.loss_fn]
            self._config = {key: float(value) for key, value in body.loss_config.items()}
            self.defaults |= {**self._loss.spec.config, **self._config}

    def evaluate(self, chunk: Chunk, targets: Targets, logprobs_NK: Tensor) -> Tensor:
        """Evaluate the loss of one chunk.

        Args:
            chunk: the datums.
            targets: their targets and inputs.
            logprobs_NK: fp32, detached.

        Returns:
            The loss's gradient in the log-probabilities, `[N, K]`; zeros if the loss is not finite, which fails the
            operation.
        """
        self.ran = True
        logprobs_NK.requires_grad_()
        logprobs_M = targets.flatten(logprobs_NK)
        terms = self._loss.terms(logprobs_M, targets.inputs, self._config)
        (gradient_NK,) = torch.autograd.grad(terms.losses.sum(), logprobs_NK)
        self._check_finite(chunk, targets, terms.losses.detach(), targets.flatten(gradient_NK))
        if self.failure is not None:
            return torch.zeros_like(gradient_NK)
        self._collect(targets, logprobs_M.detach(), terms)
        return gradient_NK

    def add_gradients(self, gradients: Factors) -> None:
        """Add those of the next chunk."""
        if self.failure is not None:
            return
        if not bool(torch.isfinite(gradients.flat).all()):
            self.failure = Failure(
                f"{self._body.kind}: the gradients are not finite although the loss is; nothing was accumulated. Look "
                "for extreme weights or advantages in the data"
            )
        elif self.gradients is None:
            self.gradients = gradients.flat
        else:
            self.gradients += gradients.flat

    def outcome(self) -> ForwardBackwardOutcome | Failure:
        """What came of it, once all chunks are through."""
        if self.failure is not None:
            return self.failure
        metrics = {"loss:sum": self._loss_sum}
        for name, (total, count) in self._averages.items():
            metrics[f"{name}:mean"] = total / count if count else 0.0
        return ForwardBackwardOutcome(tuple(self._logprobs), metrics)

    def _check_finite(self, chunk: Chunk, targets: Targets, losses_M: Tensor, gradient_M: Tensor) -> None:
        wrong_M = ~(torch.isfinite(losses_M) & torch.isfinite(gradient_M))
        if self.failure is None and bool(wrong_M.any()):
            target = int(wrong_M.nonzero()[0])
            self.failure = Failure(
                f"{self._body.kind}: data[{chunk.first + targets.datum_of(target)}]: the {self._body.loss_fn} loss is "
                f"{losses_M[target].item()}; nothing was accumulated. Check the datum's loss_fn_inputs, and whether "
                "training has diverged"
            )

    def _collect(self, targets: Targets, logprobs_M: Tensor, terms: LossTerms) -> None:
        self._loss_sum += terms.losses.detach().double().sum().item()
        for name, average in terms.averages.items():
            total, count = self._averages.get(name, (0.0, 0))
            counted = average.values[average.counted].double().sum().item()
            self._averages[name] = (total + counted, count + int(average.counted.sum()))
        self._logprobs += targets.unflatten(logprobs_M.cpu().numpy())

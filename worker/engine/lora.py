"""LoRA deltas per segment of a packed batch.

The base product runs over all T rows at once; each segment adds its own adapter's delta to its own rows, and its
gradients go into its own buffers. Nothing is ever summed over segments, so what else is packed changes nothing.
"""

# T packed tokens, N rows of one segment, I in, O out, R rank, E experts, S rows sorted by expert

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.adapter import Adapter, Factors
from worker.engine.rows import Products

GradientBuffers = Factors
"""Where the gradients of a segment are added, A and B by site."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Tokens `[start, stop)` of a packed batch, which belong to one adapter.

    Attributes:
        adapter: None is the base model alone.
        gradients: where the backward pass adds this segment's gradients; None wants none.
    """

    start: int
    stop: int
    adapter: Adapter | None = None
    gradients: GradientBuffers | None = None


class LoraScope:
    """The segments of the pass that is running, and how products are taken; every wrapped module looks here."""

    def __init__(self, products: Products) -> None:
        self.products = products
        self.segments: tuple[Segment, ...] = ()
        self.spans: tuple[tuple[int, int], ...] = ()
        """`[start, stop)` of every segment and of every gap between them, covering all rows in order."""

    @contextmanager
    def entered(self, segments: Sequence[Segment], num_rows: int) -> Iterator[None]:
        """Make `segments` those of the pass, for as long as the block lasts."""
        self.segments = tuple(sorted(segments, key=lambda segment: segment.start))
        self.spans = cover([(segment.start, segment.stop) for segment in self.segments], num_rows)
        try:
            yield
        finally:
            self.segments, self.spans = (), ()

    def deltas_at(self, site: str) -> list[Delta]:
        """What the adapters of the pass add at a linear site."""
        deltas = (Delta.of_segment(segment, site, self.products) for segment in self.segments)
        return [delta for delta in deltas if delta is not None]


def cover(spans: Sequence[tuple[int, int]], num_rows: int) -> tuple[tuple[int, int], ...]:
    """`spans` and the gaps between them: `[0, num_rows)` in order, without empty ones.

    Raises:
        ValueError: the spans overlap, are out of order or pass `num_rows`.
    """
    covered = []
    end = 0
    for start, stop in [*spans, (num_rows, num_rows)]:
        if start < end or stop > num_rows:
            raise ValueError(f"span [{start}, {stop}) overlaps another or passes the end {num_rows}")
        if start > end:
            covered.append((end, start))
        if stop > start:
            covered.append((start, stop))
        end = stop
    return tuple(covered)


@dataclass(frozen=True, eq=False)
class Delta:
    """A and B of one site, entering rows `[start, stop)`.

    Attributes:
        a, b: fp32 weights `[R, I]` and `[O, R]`.
        scaling: alpha / rank.
        products: how products with A and B are taken.
        gradient_a, gradient_b: where gradients are added; None wants none.
    """

    start: int
    stop: int
    a: Tensor
    b: Tensor
    scaling: float
    products: Products
    gradient_a: Tensor | None = None
    gradient_b: Tensor | None = None

    @classmethod
    def of_segment(cls, segment: Segment, site: str, products: Products) -> Delta | None:
        """What the segment's adapter adds at a linear site; None if it has no such site."""
        adapter, gradients = segment.adapter, segment.gradients
        if adapter is None or site not in adapter.a:
            return None
        da, db = (gradients.a[site], gradients.b[site]) if gradients is not None else (None, None)
        a_RI, b_OR = adapter.a[site], adapter.b[site]
        return cls(segment.start, segment.stop, a_RI, b_OR, adapter.scaling, products, da, db)

    def add(self, y_TO: Tensor, x_TI: Tensor) -> Tensor:
        """Add `scaling · (x Aᵀ) Bᵀ`, computed in fp32, to the rows of `y_TO`.

        Returns:
            `scaling · x Aᵀ`, fp32 `[N, R]`, which the backward pass needs.
        """
        low_NR = self.products.adapted(x_TI[self.start : self.stop].float(), self.a.t()) * self.scaling
        self._add_rows(y_TO, self.products.adapted(low_NR, self.b.t()))
        return low_NR

    def add_backward(self, dx_TI: Tensor, dy_TO: Tensor, x_TI: Tensor, low_NR: Tensor) -> None:
        """Backward of `add`: into the rows of `dx_TI`, and into the gradients."""
        dy_NO = self._rows(dy_TO)
        dlow_NR = self.products.adapted(dy_NO, self.b) * self.scaling
        self._add_rows(dx_TI, self.products.adapted(dlow_NR, self.a))
        if self.gradient_a is not None and self.gradient_b is not None:
            self.gradient_a.add_(dlow_NR.t() @ self._rows(x_TI))
            self.gradient_b.add_(dy_NO.t() @ low_NR)

    def _rows(self, values_TX: Tensor) -> Tensor:
        # a copy: where the rows lie in memory must not choose the kernel
        return values_TX[self.start : self.stop].to(torch.float32, copy=self.products.exact)

    def _add_rows(self, y_TO: Tensor, delta_NO: Tensor) -> None:
        rows_NO = y_TO[self.start : self.stop]
        if rows_NO.dtype == delta_NO.dtype:
            rows_NO += delta_NO
        else:
            rows_NO.copy_(rows_NO.float() + delta_NO)


class LoraLinear(nn.Module):
    """A frozen linear module of the base model, and the place where adapters enter it."""

    def __init__(self, linear: nn.Linear, site: str, scope: LoraScope) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.site = site
        self.products = scope.products
        self._scope = scope

    def forward(self, hidden: Tensor) -> Tensor:
        """`[…, I]` → `[…, O]`; the leading dimensions together are the rows of the packed batch."""
        x_TI = hidden.reshape(-1, self.in_features)
        deltas = self._scope.deltas_at(self.site)
        y_TO: Tensor = _LoraLinear.apply(x_TI, self, deltas)  # type: ignore[no-untyped-call]
        return y_TO.view(*hidden.shape[:-1], self.out_features)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, linear: LoraLinear, deltas: Sequence[Delta]) -> Tensor:
        y_TO = linear.products.frozen(x_TI, linear.weight.t())
        if linear.bias is not None:
            y_TO += linear.bias
        lows = [delta.add(y_TO, x_TI) for delta in deltas]
        ctx.save_for_backward(x_TI, *lows)
        ctx.linear, ctx.deltas = linear, deltas
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        dy_TO = grads[0].contiguous()
        x_TI, *lows = ctx.saved_tensors
        dx_TI = ctx.linear.products.frozen(dy_TO, ctx.linear.weight)
        for delta, low_NR in zip(ctx.deltas, lows, strict=True):
            delta.add_backward(dx_TI, dy_TO, x_TI, low_NR)
        return dx_TI, None, None

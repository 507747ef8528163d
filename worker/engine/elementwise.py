"""Activations whose rows do not depend on how many other rows there are.

Elementwise kernels on CPU compute the ends of a tensor, and of each thread's share of it, by other code than its
middle, which gives `silu` of the same number other bits. A `Way` of calling the function avoids that; which way a width
needs is tried, as for products.
"""

# T rows, W width

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from worker.engine.errors import UnsupportedModelError
from worker.engine.rows import COUNTS

Function = Callable[[Tensor], Tensor]

_CALL_NUMBERS = 1 << 15
"""Numbers of one call that torch does not share among threads."""
_WIDTH = 64
"""Numbers that a kernel takes at once, in any dtype."""


class Way(StrEnum):
    """How a function is called on T rows; from the cheapest to the surest."""

    WHOLE = "whole"
    PARTS = "parts"
    """So many rows at a time that one thread computes them."""
    WIDENED = "widened"
    """The same, with rows padded to what kernels take at once; for functions of one number."""
    SINGLE = "single"

    def call(self, function: Function, x_TW: Tensor) -> Tensor:
        """`function(x_TW)`, row by row the same in any company."""
        num_rows, width = x_TW.shape
        if self is Way.WHOLE or num_rows == 0:
            return function(x_TW)
        if self is Way.WIDENED:
            return Way.PARTS.call(function, pad(x_TW, (0, -width % _WIDTH)))[:, :width].contiguous()
        rows = 1 if self is Way.SINGLE else max(1, _CALL_NUMBERS // width)
        if rows >= num_rows:
            return function(x_TW)
        return torch.cat([function(part) for part in torch.split(x_TW, rows)])


def choose_way(function: Function, width: int, *, ways: tuple[Way, ...], like: Tensor) -> Way:
    """The first way in which rows, and their gradients, do not depend on each other.

    Args:
        function: `[T, width]` to `[T, …]`.
        width: of its input.
        ways: those to try, in order.
        like: says dtype and device.

    Raises:
        UnsupportedModelError: in no way.
    """
    generator = torch.Generator().manual_seed(0)
    x_TW = torch.randn(COUNTS[-1] + 1, width, generator=generator).to(like.device, like.dtype)
    for way in ways:
        if _keeps_rows(way, function, x_TW):
            return way
    raise UnsupportedModelError(
        f"the activation does not repeat bit for bit at width {width} on this machine: set PIECEWORK_DETERMINISTIC=off "
        "to do without"
    )


def _keeps_rows(way: Way, function: Function, x_TW: Tensor) -> bool:
    whole = _with_gradients(way, function, x_TW)
    for count in COUNTS:
        some = _with_gradients(way, function, x_TW[1 : 1 + count])
        if not all(torch.equal(part, of_all[1 : 1 + count]) for part, of_all in zip(some, whole, strict=True)):
            return False
    return True


@torch.inference_mode(False)
@torch.enable_grad()
def _with_gradients(way: Way, function: Function, x_TW: Tensor) -> tuple[Tensor, Tensor]:
    x_TW = x_TW.clone().requires_grad_()
    y_TW = way.call(function, x_TW)
    (dx_TW,) = torch.autograd.grad(y_TW, x_TW, y_TW.detach() * 0.5)
    return y_TW.detach(), dx_TW


class RowFunction:
    """A function of rows, called in the way that its width needs."""

    def __init__(self, function: Function, *, of_one_number: bool) -> None:
        self._function = function
        self._tried = tuple(Way) if of_one_number else (Way.WHOLE, Way.PARTS, Way.SINGLE)
        self.ways: dict[int, Way] = {}
        """What has been chosen, by width."""

    def __call__(self, x_TW: Tensor) -> Tensor:
        """`[T, W]` to `[T, …]`."""
        width = x_TW.shape[1]
        if width not in self.ways:
            self.ways[width] = choose_way(self._function, width, ways=self._tried, like=x_TW)
        return self.ways[width].call(self._function, x_TW)


class RowActivation(nn.Module):
    """A model's own activation, as a `RowFunction`."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.rows = RowFunction(activation, of_one_number=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """Same shape; the leading dimensions together are the rows."""
        return self.rows(hidden.reshape(-1, hidden.shape[-1])).reshape(hidden.shape)

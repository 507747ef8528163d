"""Matrix products whose rows do not depend on how many other rows there are, nor on their place among them.

On CPU a product takes other kernels for other numbers of rows, and for columns at the end of a narrow output; the same
row then has other bits. A `RowRule` pads such products to shapes that do not; which rule a shape needs on this machine
is found by `worker/engine/self_test.py`, not assumed.
"""

# N rows, I in, O out

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from worker.engine.errors import UnsupportedModelError


@dataclass(frozen=True)
class RowRule:
    """How products of one shape are padded.

    Attributes:
        multiple: rows are padded to a multiple of this,
        regular: unless there are at least so many.
        columns: output columns are padded to a multiple of this.
        tile: most rows of one product, 0 for any number; products of fewer rows are padded to it.
    """

    multiple: int
    regular: int
    columns: int
    tile: int = 0

    def padded(self, num_rows: int) -> int:
        """The least number of rows, from `num_rows` up, at which a row has its usual bits."""
        if num_rows >= self.regular and not self.tile:
            return num_rows
        return -(-num_rows // self.multiple) * self.multiple

    def product(self, x_NI: Tensor, weight_IO: Tensor) -> Tensor:
        """`x @ weight`, padded, without what is padding."""
        num_rows, num_columns = x_NI.shape[0], weight_IO.shape[1]
        missing, narrow = self.padded(num_rows) - num_rows, -num_columns % self.columns
        if narrow:
            weight_IO = pad(weight_IO, (0, narrow))
        if missing:
            x_NI = pad(x_NI, (0, 0, 0, missing))
        if self.tile and x_NI.shape[0] > self.tile:
            y_NO = torch.cat([tile_NI @ weight_IO for tile_NI in torch.split(x_NI, self.tile)])
        else:
            y_NO = x_NI @ weight_IO
        return y_NO[:num_rows, :num_columns].contiguous() if narrow else y_NO[:num_rows]

    def __str__(self) -> str:
        return f"{self.multiple}/{min(self.regular, 99)}/{self.columns}/{self.tile}"


LADDER = (
    RowRule(multiple=1, regular=0, columns=1),
    RowRule(multiple=4, regular=12, columns=1),
    RowRule(multiple=4, regular=12, columns=16),
    RowRule(multiple=16, regular=1 << 62, columns=16),
    RowRule(multiple=32, regular=0, columns=16, tile=32),
    RowRule(multiple=1, regular=0, columns=1, tile=1),
)
"""From the cheapest to the surest: one row at a time has no company."""

COUNTS = (1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 17, 33, 66, 130, 259)
"""Numbers of rows that a rule is tried with."""
_OFFSETS = (0, 1, 5)
_MULTIPLICATIONS_MAX = 1 << 27
"""Larger numbers of rows are tried only within this; it is counted, not timed, so that all workers try the same."""
_COUNTS_AT_LEAST = 8


def choose_rule(weight_IO: Tensor, *, ladder: tuple[RowRule, ...] = LADDER) -> RowRule:
    """The first rule of the ladder under which rows of products with this weight do not depend on each other.

    Random rows from a fixed seed are multiplied in company of every number tried, at several places; the choice is
    the same for every worker on the same hardware with the same number of threads.

    Raises:
        UnsupportedModelError: under no rule.
    """
    counts = _counts(weight_IO)
    generator = torch.Generator().manual_seed(0)
    num_rows = counts[-1] + max(_OFFSETS)
    x_NI = torch.randn(num_rows, weight_IO.shape[0], generator=generator).to(weight_IO.device, weight_IO.dtype)
    for rule in ladder:
        if _keeps_rows(rule, x_NI, weight_IO, counts):
            return rule
    raise UnsupportedModelError(
        f"a product of shape {list(weight_IO.shape)} does not repeat bit for bit on this machine: set "
        "PIECEWORK_DETERMINISTIC=off to do without"
    )


def _counts(weight_IO: Tensor) -> tuple[int, ...]:
    total = 0
    counts: list[int] = []
    for count in COUNTS:
        total += count * weight_IO.numel()
        if len(counts) >= _COUNTS_AT_LEAST and total > _MULTIPLICATIONS_MAX:
            break
        counts.append(count)
    return tuple(counts)


def _keeps_rows(rule: RowRule, x_NI: Tensor, weight_IO: Tensor, counts: tuple[int, ...]) -> bool:
    whole_NO = rule.product(x_NI, weight_IO)
    for index, count in enumerate(counts):
        start = _OFFSETS[index % len(_OFFSETS)]
        some_NO = rule.product(x_NI[start : start + count], weight_IO)
        if not torch.equal(some_NO, whole_NO[start : start + count]):
            return False
    return True


@dataclass(frozen=True)
class Shape:
    """What a rule holds for: the weight of a product, as it lies in memory."""

    size_in: int
    size_out: int
    transposed: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, weight_IO: Tensor) -> Shape:
        """The shape of this weight."""
        size_in, size_out = weight_IO.shape
        return cls(size_in, size_out, weight_IO.stride(1) != 1, weight_IO.dtype)

    def __str__(self) -> str:
        return f"{self.size_in}x{self.size_out}{'T' if self.transposed else ''} {self.dtype}".replace("torch.", "")


class Products:
    """All products of a model and its adapters; where `exact`, each shape by the rule that it needs."""

    def __init__(self, *, exact: bool) -> None:
        self.exact = exact
        self._rules: dict[Shape, RowRule] = {}
        self._widened: dict[tuple[int, Shape], Tensor] = {}

    @property
    def rules(self) -> dict[Shape, RowRule]:
        """What has been chosen so far, by shape."""
        return dict(self._rules)

    def padded_rows(self, num_rows: int) -> int:
        """Rows of a pass at which the products of the base model need no more padding, tiles aside."""
        return max((rule.padded(num_rows) for rule in self._rules.values()), default=num_rows)

    def adapted(self, x_NI: Tensor, weight_IO: Tensor) -> Tensor:
        """`x @ weight` with a factor of an adapter."""
        if not self.exact:
            return x_NI @ weight_IO
        return self.rule_of_factor(weight_IO).product(x_NI, weight_IO)

    def frozen(self, x_NI: Tensor, weight_IO: Tensor) -> Tensor:
        """`x @ weight` with a weight of the base model, which never changes or moves."""
        if not self.exact:
            return x_NI @ weight_IO
        rule = self.rule_of_frozen(weight_IO)
        narrow = -weight_IO.shape[1] % rule.columns
        if not narrow:
            return rule.product(x_NI, weight_IO)
        key = (weight_IO.data_ptr(), Shape.of(weight_IO))
        if key not in self._widened:
            self._widened[key] = pad(weight_IO, (0, narrow))
        widened_IO = self._widened[key]
        return rule.product(x_NI, widened_IO)[:, : weight_IO.shape[1]].contiguous()

    def rule_of_frozen(self, weight_IO: Tensor) -> RowRule:
        """The rule of a base model's weight, tried on the weight itself."""
        shape = Shape.of(weight_IO)
        rule = self._rules.get(shape)
        if rule is None:
            rule = self._rules[shape] = choose_rule(weight_IO)
        return rule

    def rule_of_factor(self, weight_IO: Tensor) -> RowRule:
        """The rule of an adapter's factor, tried on random numbers: those of a new B are all zero."""
        shape = Shape.of(weight_IO)
        rule = self._rules.get(shape)
        if rule is None:
            generator = torch.Generator().manual_seed(1)
            size_in, size_out = weight_IO.shape
            if shape.transposed:
                random_IO = torch.randn(size_out, size_in, generator=generator).t()
            else:
                random_IO = torch.randn(size_in, size_out, generator=generator)
            rule = self._rules[shape] = choose_rule(random_IO.to(weight_IO.device, weight_IO.dtype))
        return rule

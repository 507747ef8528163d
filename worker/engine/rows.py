"""Matrix products whose rows do not depend on how many other rows there are.

On CPU, products of fewer than 12 rows whose number is not a multiple of 4 take other kernels for the rest, and so give
other bits for the same row. They are padded to such a multiple here, and products with a single column, which are
always irregular, to two columns. Measured for fp32 on x86-64 with MKL, for `x Wᵀ` and `dy W` at every row count up to
300, and tested; elsewhere rows are equal within floating-point noise.
"""

# N rows, I in, O out

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_MULTIPLE, _ROWS_REGULAR = 4, 12


def padded_rows(num_rows: int) -> int:
    """The least number of rows, from `num_rows` up, whose product gives each row the usual bits."""
    return num_rows if num_rows >= _ROWS_REGULAR else -(-num_rows // _ROWS_MULTIPLE) * _ROWS_MULTIPLE


def rows_product(x_NI: Tensor, weight_IO: Tensor) -> Tensor:
    """`x @ weight`, each row independent of the number of rows (on CPU).

    Args:
        x_NI: any number of rows, 0 included.
        weight_IO: same dtype and device.
    """
    num_rows, num_columns = x_NI.shape[0], weight_IO.shape[1]
    missing = padded_rows(num_rows) - num_rows
    if x_NI.device.type != "cpu" or (missing == 0 and num_columns > 1):
        return x_NI @ weight_IO
    if num_columns == 1:
        weight_IO = torch.cat([weight_IO, torch.zeros_like(weight_IO)], dim=1)
    if missing:
        x_NI = torch.cat([x_NI, x_NI.new_zeros(missing, x_NI.shape[1])])
    return (x_NI @ weight_IO)[:num_rows, :num_columns]

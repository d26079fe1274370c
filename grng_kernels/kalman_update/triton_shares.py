# SPDX-License-Identifier: Apache-2.0
"""How the parameters of a Kalman update are shared out to Triton programs, and how these find their part.

All blocks are one range of columns of ``H``, cut into shares of nearly equal length; a share may begin and
end inside a block. Both passes use the same shares: the second walks each of them backwards and finds in
the cache what the first read last. The cut depends on the lengths alone, so every bit of the result is the
same on every device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grng_kernels import _table

# What the table holds of one block. Element strides; "aligned" says whether 16 bytes may be read at once.
_JACOBIAN, _MEAN, _VARIANCE, _LENGTH, _ROW, _COLUMN, _ALIGNED = map(tl.constexpr, range(7))
_FIELDS = tl.constexpr(7)

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Shorter shares begin at a multiple of this many columns of a block, so that reads stay aligned.
UNIT = 128


class Shares(NamedTuple):
    """The table on the device, where the shares begin in it, and how many there are."""

    table: Tensor
    starts_at: int
    number: int


def cut(lengths: Sequence[int], most: int, unit: int) -> list[tuple[int, int]]:
    """Return where each share begins, as ``(block, column)``, and the end as ``(blocks, 0)``.

    Args:
        lengths: Columns of each block.
        most: Shares at most.
        unit: Columns of a share at least, but for the last; a multiple of ``UNIT``.
    """
    # A program reads whole units.
    costs = [-(-length // UNIT) * UNIT for length in lengths]
    total = sum(costs)
    share = max(-(-total // most), 1)
    share = -(-share // unit) * unit
    starts, before, wanted = [], 0, 0
    for block, cost in enumerate(costs):
        while wanted < before + cost:
            starts.append((block, wanted - before))
            wanted += share
        before += cost
    return [*starts, (len(lengths), 0)]


def _is_aligned(jacobian: Tensor) -> bool:
    size = jacobian.element_size()
    rows, columns = jacobian.stride()
    return (
        columns == 1
        and jacobian.data_ptr() % 16 == 0
        and (jacobian.shape[0] == 1 or rows * size % 16 == 0)
        and jacobian.shape[1] * size % 16 == 0
    )


def shares_of(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    jacobians: Sequence[Tensor],
    most: int,
    unit: int,
) -> Shares:
    """Return the shares of a list of blocks; the table is made once for a list and kept.

    Args:
        means: ``[d_i]``, contiguous.
        variances: Same form.
        jacobians: ``[C, d_i]``, any strides.
        most: Shares at most.
        unit: Columns of a share at least.
    """
    device = means[0].device

    def build() -> Shares:
        numbers: list[int] = []
        for mean, variance, jacobian in zip(means, variances, jacobians, strict=True):
            numbers += [
                jacobian.data_ptr(), mean.data_ptr(), variance.data_ptr(), mean.numel(),
                *jacobian.stride(), _is_aligned(jacobian),
            ]  # fmt: skip
        # The end is read like a block, one of no length.
        numbers += [0] * _FIELDS.value
        starts = cut([m.numel() for m in means], most, unit)
        at = len(numbers)
        for block, column in starts:
            numbers += [block, column]
        table = _table.upload(torch.tensor(numbers, dtype=torch.int64), device)
        return Shares(table, at, len(starts) - 1)

    key = (
        "kalman_update", most, unit,
        *((m.data_ptr(), v.data_ptr(), h.data_ptr(), h.shape, h.stride(), h.dtype)
          for m, v, h in zip(means, variances, jacobians, strict=True)),
    )  # fmt: skip
    shares: Shares = _table.cached(key, device, build)
    return shares


@triton.jit
def share_bounds(starts_ptr, share):
    """Return the first block and column of a share, and the block and column where it ends."""
    starts_ptr += 2 * share
    return (
        tl.load(starts_ptr),
        tl.load(starts_ptr + 1),
        tl.load(starts_ptr + 2),
        tl.load(starts_ptr + 3),
    )


@triton.jit
def block_of(table_ptr, block):
    """Return the address of ``H`` as a number, mean, variance, the strides of ``H``, and if it is aligned."""
    row = table_ptr + block * _FIELDS
    return (
        tl.load(row + _JACOBIAN),
        tl.load(row + _MEAN).to(tl.pointer_type(tl.float32)),
        tl.load(row + _VARIANCE).to(tl.pointer_type(tl.float32)),
        tl.load(row + _ROW),
        tl.load(row + _COLUMN),
        tl.load(row + _ALIGNED),
    )


@triton.jit
def columns_of(table_ptr, block, first_block, first_column, last_block, last_column):
    """Return the columns ``[begin, end)`` of a block that belong to a share."""
    length = tl.load(table_ptr + block * _FIELDS + _LENGTH)
    begin = tl.where(block == first_block, first_column, 0)
    return begin, tl.where(block == last_block, last_column, length)


@triton.jit
def magnitude(x):
    """Return fp32 as integers in the order of their absolute values: infinity and NaN above all numbers."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def variance_magnitude(p):
    """The same for variances, where one below zero is like NaN."""
    return tl.where(p < 0, 0x7FFFFFFF, magnitude(p))


@triton.jit
def write_state(
    mean_ptr, variance_ptr, at, inside, p, t, step, forgetting, process_noise,
    VARIATIONAL: tl.constexpr,
):  # fmt: skip
    """Write mean and variance of the columns ``at``: ``t = p·‖whitener h‖²``, ``step`` that of the mean."""
    # A product too large for fp32 may have ended as NaN.
    t = tl.where(t == t, t, float("inf"))
    if VARIATIONAL:
        posterior = tl.div_rn(p, 1.0 + t)
    else:
        # 1 - t > 0 in exact arithmetic; rounding must not make it zero or negative.
        posterior = p * tl.maximum(1.0 - t, 1.1920929e-7)
    # All digits: what rounds up to the largest fp32 number would make this fp64.
    new = tl.minimum(tl.div_rn(posterior, forgetting) + process_noise, 3.4028234663852886e38)
    tl.store(variance_ptr + at, new, mask=inside)
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
    tl.store(mean_ptr + at, mean + step, mask=inside)

# SPDX-License-Identifier: Apache-2.0
"""The two streaming passes of ``kalman_update_`` in Triton, over all blocks of the state at once.

1. ``_gram_narrow_kernel`` or ``_gram_wide_kernel``: the grams of one share of the columns of ``H``, and the
   largest magnitudes in it.
2. ``_sum_kernel``: adds the shares in a fixed order, in fp64.
3. (``innovation.py``: the C x C stage, by torch.)
4. ``_apply_narrow_kernel`` or ``_apply_wide_kernel``: mean and variance, each share backwards; the wide one
   after ``_split_kernel``, which cuts the whitener into pieces for the tensor cores.

Up to 16 outputs take the narrow kernels (``triton_narrow.py``), up to 128 the wide ones (``triton_wide.py``);
addresses and lengths come from a table on the device (``triton_shares.py``).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grng_kernels._dispatch import interpreting_triton
from grng_kernels.kalman_update import triton_narrow as narrow
from grng_kernels.kalman_update import triton_wide as wide
from grng_kernels.kalman_update.triton_shares import DTYPES, Shares, shares_of

MAX_OUTPUTS = wide.MAX_OUTPUTS
# Sums of one program, and shares that it adds at once.
SUM_BLOCK, SUM_SHARES, SUM_WARPS = 16, 256, 8


class Grams(NamedTuple):
    """What the first pass found, in fp64: ``[C, C]`` twice, and 0-d."""

    weighted: Tensor
    plain: Tensor | None
    mean_max: Tensor
    variance_max: Tensor


@triton.jit(do_not_specialize=["outputs", "shares"])
def _sum_kernel(
    sums_ptr,
    partial_ptr,
    extremes_ptr,
    outputs,
    shares,
    GRAMS: tl.constexpr,
    TILE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size = outputs * outputs
    inside = index < GRAMS * size
    row, column = index % size // outputs, index % size % outputs
    # Only the lower triangle is read: the result is symmetric to the last bit.
    low, high = tl.minimum(row, column), tl.maximum(row, column)
    pair = high // TILE * (high // TILE + 1) // 2 + low // TILE
    offset = (index // size * PAIRS + pair) * (TILE * TILE) + high % TILE * TILE + low % TILE
    step: tl.constexpr = GRAMS * PAIRS * TILE * TILE
    total = tl.zeros((AT_ONCE, BLOCK), tl.float64)
    for start in range(0, shares, AT_ONCE):
        share = (start + tl.arange(0, AT_ONCE))[:, None].to(tl.int64)
        pointers = partial_ptr + share * step + offset[None, :].to(tl.int64)
        total += tl.load(pointers, mask=(share < shares) & inside[None, :], other=0.0).to(
            tl.float64
        )
    sums = tl.sum(total, 0)
    # Whether the input is finite is seen in the extremes: what is NaN here has overflowed.
    sums = tl.where(sums == sums, sums, float("inf"))
    tl.store(sums_ptr + index, sums, mask=inside)
    if tl.program_id(0) == 0:
        mean = tl.zeros((AT_ONCE,), tl.int32)
        variance = tl.zeros((AT_ONCE,), tl.int32)
        element = tl.zeros((AT_ONCE,), tl.int32)
        count = shares * (GRAMS * PAIRS)
        for start in range(0, count, AT_ONCE):
            number = (start + tl.arange(0, AT_ONCE)).to(tl.int64)
            pointers = extremes_ptr + number * 3
            mean = tl.maximum(mean, tl.load(pointers, mask=number < count, other=0))
            variance = tl.maximum(variance, tl.load(pointers + 1, mask=number < count, other=0))
            element = tl.maximum(element, tl.load(pointers + 2, mask=number < count, other=0))
        # An infinite Jacobian is told like a mean that is NaN.
        of_mean = tl.where(tl.max(element, 0) < 0x7F800000, tl.max(mean, 0), 0x7FFFFFFF)
        of_variance = tl.max(variance, 0)
        sums_ptr += GRAMS * size
        tl.store(sums_ptr, of_mean.to(tl.float32, bitcast=True).to(tl.float64))
        tl.store(sums_ptr + 1, of_variance.to(tl.float32, bitcast=True).to(tl.float64))


def tiles_of(outputs: int) -> tuple[int, int]:
    """Return the order of a tile of the gram, and how many its lower triangle has: one or three."""
    if outputs <= narrow.MAX_OUTPUTS:
        tile = min(narrow.TILE, triton.next_power_of_2(outputs))
    else:
        tile = min(wide.HALF, wide.padded(outputs))
    return tile, 1 if outputs <= tile else 3


class Passes:
    """Both passes of one update; the arguments are those of :func:`~grng_kernels.kalman_update_`, as lists.

    Args:
        means: ``[d_i]`` fp32, contiguous, on one device.
        variances: Same form.
        jacobians: ``[C, d_i]``, any strides, fp32, bf16 or fp16; mixed ones are copied to fp32.
        outputs: C, 1 to 128.
    """

    def __init__(
        self,
        means: Sequence[Tensor],
        variances: Sequence[Tensor],
        jacobians: Sequence[Tensor],
        outputs: int,
    ) -> None:
        if len({h.dtype for h in jacobians}) > 1:
            jacobians = [h.float() for h in jacobians]
        self._jacobians, self._device = jacobians, means[0].device
        self._dtype, self._outputs = jacobians[0].dtype, outputs
        self._narrow = outputs <= narrow.MAX_OUTPUTS
        most, unit = (narrow.SHARES, narrow.UNIT) if self._narrow else (wide.SHARES, wide.UNIT)
        self._shares: Shares = shares_of(means, variances, jacobians, most, unit)

    def grams(self, *, plain: bool) -> Grams:
        """Run the first pass, with ``H Hᵀ`` beside ``H diag(p) Hᵀ`` where ``plain``: two launches."""
        shares, outputs = self._shares, self._outputs
        grams, device = 1 + plain, self._device
        tile, pairs = tiles_of(outputs)
        numbers = shares.number * grams * pairs
        partial = torch.empty(numbers * tile**2, dtype=torch.float32, device=device)
        extremes = torch.empty(3 * numbers, dtype=torch.int32, device=device)
        given = (partial, extremes, shares.table, shares.starts_at, outputs)
        grid = (grams * pairs, shares.number)
        if self._narrow:
            narrow._gram_narrow_kernel[grid](
                *given, DTYPE=DTYPES[self._dtype], TILE=tile, PAIRS=pairs,
                LANES=narrow.gram_lanes(tile), num_warps=narrow.GRAM_WARPS,
            )  # fmt: skip
        else:
            config = wide.config_of(outputs, self._dtype)
            wide._gram_wide_kernel[grid](
                *given, DTYPE=DTYPES[self._dtype], ONE_PIECE=wide.is_one_piece(self._dtype),
                PIECE=_piece()[1], TILE=tile, PAIRS=pairs, BLOCK_K=config.gram_k,
                num_warps=config.gram_warps, num_stages=config.gram_stages,
            )  # fmt: skip
        size = outputs**2
        sums = torch.empty(grams * size + 2, dtype=torch.float64, device=device)
        _sum_kernel[(triton.cdiv(grams * size, SUM_BLOCK),)](
            sums, partial, extremes, outputs, shares.number, GRAMS=grams, TILE=tile, PAIRS=pairs,
            BLOCK=SUM_BLOCK, AT_ONCE=SUM_SHARES, num_warps=SUM_WARPS,
        )  # fmt: skip
        both = sums[: grams * size].view(grams, outputs, outputs)
        return Grams(both[0], both[1] if plain else None, sums[-2], sums[-1])

    def apply(
        self,
        direction: Tensor,
        whitener: Tensor,
        info: Tensor,
        *,
        variational: bool,
        triangular: bool,
        forgetting: float,
        process_noise: float,
    ) -> None:
        """Write mean and variance, or nothing where ``info`` is not 0: one launch, two beyond 16 outputs.

        Args:
            direction: ``[C]`` fp32, contiguous.
            whitener: ``[k, C]`` fp32, contiguous, ``k <= C``.
            info: int32, 0-d.
            variational: ``p / (1 + t)`` in place of ``p (1 - t)``.
            triangular: The whitener is zero above its diagonal.
            forgetting: In (0, 1].
            process_noise: >= 0.
        """
        shares, outputs, ranks = self._shares, self._outputs, whitener.shape[0]
        numbers = (forgetting, process_noise)
        if self._narrow:
            narrow._apply_narrow_kernel[(shares.number,)](
                shares.table, shares.starts_at, whitener, direction, info, outputs, ranks, *numbers,
                DTYPE=DTYPES[self._dtype], VARIATIONAL=variational,
                ROWS=triton.next_power_of_2(outputs), LANES=narrow.APPLY_LANES,
                num_warps=narrow.APPLY_WARPS,
            )  # fmt: skip
            return
        rows = wide.padded(outputs)
        config, (kind, piece) = wide.config_of(outputs, self._dtype), _piece()
        parts = torch.empty(3 * rows**2, dtype=kind, device=self._device)
        wide._split_kernel[(rows**2 // wide.SPLIT_BLOCK,)](
            parts, whitener, outputs, ranks, PIECE=piece, ROWS=rows, BLOCK=wide.SPLIT_BLOCK
        )
        wide._apply_wide_kernel[(shares.number,)](
            shares.table, shares.starts_at, parts, direction, info, outputs, *numbers,
            DTYPE=DTYPES[self._dtype], VARIATIONAL=variational, TRIANGULAR=triangular,
            ONE_PIECE=wide.is_one_piece(self._dtype), PIECE=piece, ROWS=rows,
            HALF=min(rows, wide.HALF), BLOCK_D=config.apply_d, BLOCK_K=config.apply_k,
            num_warps=config.apply_warps, num_stages=config.apply_stages,
        )  # fmt: skip


def _piece() -> tuple[torch.dtype, tl.dtype]:
    # The interpreter multiplies the bit patterns of bf16; in fp32 the pieces are the same numbers.
    if interpreting_triton():
        return torch.float32, tl.float32
    return torch.bfloat16, tl.bfloat16

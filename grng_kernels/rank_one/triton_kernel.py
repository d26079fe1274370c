# SPDX-License-Identifier: Apache-2.0
"""``(damping·I + u uᵀ)⁻¹ g`` in Triton: two passes over the blocks of one long vector.

1. ``_dots_kernel``: both dot products of one chunk, in fp64.
2. ``_coefficient_kernel``, one program: adds them in a fixed order.
3. ``_apply_kernel``: the result, chunk by chunk, the last first: it is still in the cache.

All blocks share the launches; addresses and lengths come from a table on the device (``_table.py``).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from grng_kernels import _table

# Elements of one program, of one step of its loop, and partial sums that are added at once.
CHUNK, BLOCK, SUMS_BLOCK = 8192, 1024, 1024
WARPS = 4

# What the table holds of one chunk.
_GRAD, _SCORE, _OUT, _LENGTH = map(tl.constexpr, range(4))
_FIELDS = tl.constexpr(4)

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _dots_kernel(
    sums_ptr, table_ptr, DTYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    chunk = tl.program_id(0).to(tl.int64)
    row = table_ptr + chunk * _FIELDS
    grad_ptr = tl.load(row + _GRAD).to(tl.pointer_type(DTYPE))
    score_ptr = tl.load(row + _SCORE).to(tl.pointer_type(DTYPE))
    length = tl.load(row + _LENGTH)
    mixed = tl.zeros((BLOCK,), tl.float64)
    square = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, CHUNK, BLOCK):
        at = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + at, mask=at < length, other=0.0).to(tl.float64)
        score = tl.load(score_ptr + at, mask=at < length, other=0.0).to(tl.float64)
        mixed += score * grad
        square += score * score
    tl.store(sums_ptr + 2 * chunk, tl.sum(mixed, 0))
    tl.store(sums_ptr + 2 * chunk + 1, tl.sum(square, 0))


@triton.jit
def _coefficient_kernel(coefficient_ptr, sums_ptr, damping_ptr, chunks, BLOCK: tl.constexpr):
    mixed = tl.zeros((BLOCK,), tl.float64)
    square = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, chunks, BLOCK):
        at = (start + tl.arange(0, BLOCK)).to(tl.int64)
        mixed += tl.load(sums_ptr + 2 * at, mask=at < chunks, other=0.0)
        square += tl.load(sums_ptr + 2 * at + 1, mask=at < chunks, other=0.0)
    damping = tl.load(damping_ptr).to(tl.float64)
    tl.store(coefficient_ptr, tl.sum(mixed, 0) / (damping + tl.sum(square, 0)))


@triton.jit
def _apply_kernel(
    coefficient_ptr,
    damping_ptr,
    table_ptr,
    chunks,
    DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = chunks - 1 - tl.program_id(0).to(tl.int64)
    row = table_ptr + chunk * _FIELDS
    grad_ptr = tl.load(row + _GRAD).to(tl.pointer_type(DTYPE))
    score_ptr = tl.load(row + _SCORE).to(tl.pointer_type(DTYPE))
    out_ptr = tl.load(row + _OUT).to(tl.pointer_type(DTYPE))
    length = tl.load(row + _LENGTH)
    coefficient = tl.load(coefficient_ptr)
    damping = tl.load(damping_ptr).to(tl.float64)
    for start in range(0, CHUNK, BLOCK):
        at = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + at, mask=at < length, other=0.0).to(tl.float64)
        score = tl.load(score_ptr + at, mask=at < length, other=0.0).to(tl.float64)
        result = (grad - coefficient * score) / damping
        if DTYPE != tl.float64:
            # No instruction goes from fp64 to 16 bits at once.
            result = result.to(tl.float32)
        tl.store(out_ptr + at, result.to(DTYPE), mask=at < length)


def _build(
    outs: Sequence[Tensor], grads: Sequence[Tensor], scores: Sequence[Tensor]
) -> list[list[int]]:
    rows = []
    for out, grad, score in zip(outs, grads, scores, strict=True):
        size = out.element_size()
        for begin in range(0, out.numel(), CHUNK):
            shift = begin * size
            rows.append(
                [
                    grad.data_ptr() + shift,
                    score.data_ptr() + shift,
                    out.data_ptr() + shift,
                    min(CHUNK, out.numel() - begin),
                ]
            )
    return rows


def launch(
    outs: Sequence[Tensor],
    grads: Sequence[Tensor],
    scores: Sequence[Tensor],
    damping: float | Tensor,
) -> None:
    """Write ``(damping·I + u uᵀ)⁻¹ g`` into ``outs`` in three launches, with no host sync.

    Args:
        outs: The blocks of the result, contiguous, of one dtype: fp32, fp64, bf16 or fp16.
        grads: ``g``, same form and dtype.
        scores: ``u``, same form and dtype.
        damping: A number, or a 0-d tensor on the device.
    """
    device, dtype = outs[0].device, outs[0].dtype
    key = (
        "rank_one",
        dtype,
        *(tuple((t.data_ptr(), t.numel()) for t in x) for x in (outs, grads, scores)),
    )

    def build() -> tuple[Tensor, int]:
        rows = _build(outs, grads, scores)
        return _table.upload(torch.tensor(rows, dtype=torch.int64).flatten(), device), len(rows)

    with torch.cuda.device_of(outs[0]):
        table, chunks = _table.cached(key, device, build)
        if chunks == 0:
            return
        if not isinstance(damping, Tensor):
            damping = torch.full((), damping, dtype=torch.float64, device=device)
        sums = torch.empty(2 * chunks, dtype=torch.float64, device=device)
        coefficient = torch.empty((), dtype=torch.float64, device=device)
        sizes = {"DTYPE": DTYPES[dtype], "CHUNK": CHUNK, "BLOCK": BLOCK, "num_warps": WARPS}
        _dots_kernel[(chunks,)](sums, table, **sizes)
        _coefficient_kernel[(1,)](
            coefficient, sums, damping, chunks, BLOCK=SUMS_BLOCK, num_warps=WARPS
        )
        _apply_kernel[(chunks,)](coefficient, damping, table, chunks, **sizes)

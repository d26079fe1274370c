# SPDX-License-Identifier: Apache-2.0
"""The factor update in Triton: one program per tile of the lower triangle, each stored to both triangles."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grng_kernels._dispatch import interpreting_triton
from grng_kernels.kron_factor.reference import batch_info


class Config(NamedTuple):
    """Tile sizes and launch parameters of one variant of the kernel."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Chosen by reasoning, not yet by measurement: the largest tile that compiles without spills for sm_80,
# sm_90 and sm_100 and for tensors of any alignment (tests/aot/test_triton_aot.py; a tile of 128 does not),
# and smaller tiles for small factors so that few lanes idle.
CONFIGS_16BIT = {
    16: Config(16, 64, 4, 3),
    32: Config(32, 32, 4, 3),
    64: Config(64, 64, 8, 3),
}
CONFIGS_FP32 = {
    16: Config(16, 64, 2, 3),
    32: Config(32, 32, 4, 3),
    64: Config(64, 32, 4, 3),
}


def config_for(n: int, dtype: torch.dtype) -> Config:
    """Return the variant for a factor of order ``n``: the smallest tile that holds it, or the largest."""
    table = CONFIGS_FP32 if dtype == torch.float32 else CONFIGS_16BIT
    return table[min((b for b in table if b >= n), default=max(table))]


@triton.jit
def _load_columns(
    x_ptr,
    offs_k,
    offs_n,
    rows,
    width,
    stride_xk,
    stride_xn,
    BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Row offsets are int64: rows * stride passes 2^31 long before memory ends.
    pointers = (
        x_ptr + offs_k[:, None].to(tl.int64) * stride_xk + offs_n[None, :].to(tl.int64) * stride_xn
    )
    mask = (offs_k[:, None] < rows) & (offs_n[None, :] < width)
    x = tl.load(pointers, mask=mask, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    if BIAS:
        ones = (offs_k[:, None] < rows) & (offs_n[None, :] == width)
        x = tl.where(ones, 1.0, x).to(x.dtype)
    return x


@triton.jit
def _kron_factor_update_kernel(
    factor_ptr,
    x_ptr,
    info_ptr,
    weights_ptr,
    n,
    width,
    rows,
    stride_fm,
    stride_fn,
    stride_xk,
    stride_xn,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if tl.load(info_ptr) == 0:
        # Tile number -> (row, column) in the lower triangle; fp32 rounding is mended by the two steps.
        tile = tl.program_id(0)
        tile_m = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        tile_m = tl.where((tile_m + 1) * (tile_m + 2) // 2 <= tile, tile_m + 1, tile_m)
        tile_m = tl.where(tile_m * (tile_m + 1) // 2 > tile, tile_m - 1, tile_m)
        tile_n = tile - tile_m * (tile_m + 1) // 2
        offs_m = tile_m * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)

        acc = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
        for k in range(0, rows, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            left = _load_columns(
                x_ptr, offs_k, offs_m, rows, width, stride_xk, stride_xn, BIAS, UPCAST
            )  # [BLOCK_K, BLOCK_N]
            right = _load_columns(
                x_ptr, offs_k, offs_n, rows, width, stride_xk, stride_xn, BIAS, UPCAST
            )  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)

        decay = tl.load(weights_ptr)
        scale = tl.load(weights_ptr + 1)
        row, col = offs_m[:, None].to(tl.int64), offs_n[None, :].to(tl.int64)
        lower = (row < n) & (col <= row)
        pointers = factor_ptr + row * stride_fm + col * stride_fn
        old = tl.load(pointers, mask=lower, other=0.0)
        # With decay 0 the old content does not count: it may be anything, NaN included.
        old = tl.where(decay == 0.0, 0.0, old)
        new = decay * old + scale * acc
        tl.store(pointers, new, mask=lower)
        tl.store(factor_ptr + col * stride_fm + row * stride_fn, new, mask=(row < n) & (col < row))


def launch(
    factor: Tensor,
    x: Tensor,
    info: Tensor,
    *,
    decay: float | Tensor,
    scale: float | Tensor,
    bias: bool,
) -> None:
    """Update one factor in place and write ``info`` (0-d int32), with no host sync.

    The batch is checked first and the kernel reads the verdict: where it is not 0, nothing is written.
    """
    info.copy_(batch_info(factor, x, decay=decay, scale=scale, bias=bias))
    weights = torch.empty(2, dtype=torch.float32, device=x.device)
    for slot, value in zip(weights.unbind(), (decay, scale), strict=True):
        if isinstance(value, Tensor):
            slot.copy_(value)
        else:
            slot.fill_(value)
    n = factor.shape[0]
    config = config_for(n, x.dtype)
    tiles = triton.cdiv(n, config.block_n)
    interpreting = interpreting_triton()
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    with torch.cuda.device_of(x):
        _kron_factor_update_kernel[(tiles * (tiles + 1) // 2,)](
            factor,
            x,
            info,
            weights,
            n,
            x.shape[1],
            x.shape[0],
            factor.stride(0),
            factor.stride(1),
            x.stride(0),
            x.stride(1),
            BIAS=bias,
            PRECISION="tf32x3" if x.dtype == torch.float32 else "ieee",
            # The interpreter multiplies the bit patterns of bf16.
            UPCAST=interpreting and x.dtype == torch.bfloat16,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            **options,
        )

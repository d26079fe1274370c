# SPDX-License-Identifier: Apache-2.0
"""Newton-Schulz for large matrices on the GPU: one launch per product, for all matrices of a call together.

With ``S = I - X B``, the transpose of the residual ``E = I - B X``, both products of a step read their two
operands along rows: ``S_ij = I_ij - sum_k X_ik B_jk`` and ``(X E)_ij = sum_k X_ik S_jk``, because ``B`` and
``X`` are bitwise symmetric. ``S`` is computed in full from the original ``B`` and never symmetrised;
``X <- (a + b) X - b X E`` is computed in the lower triangle and written to both sides.

The first step starts from ``X = c I`` and is ``p I + q B``, which is never stored: the second step reads ``B``
instead, and its ``S = I - p B - q B B`` is symmetric by itself.

Which precision a product needs follows from ``rho`` alone (``precision.py``). For products in bf16 their
operands are also stored as one or two bf16 numbers (rounded, and what that leaves over), so that tiles go to
the tensor cores as they lie in memory.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grng_kernels._dispatch import interpreting_triton
from grng_kernels.damped_inverse import triton_prologue
from grng_kernels.damped_inverse.entry import Entry
from grng_kernels.damped_inverse.precision import Plan, Step, newton_schulz_plan
from grng_kernels.damped_inverse.triton_epilogue import epilogue
from grng_kernels.damped_inverse.triton_prologue import (
    _FIELDS,
    _PADDED,
    _SQUARE,
    _STATE,
    _TOP,
    CHUNK,
    TILE,
    Segment,
    _find,
    _rounded,
    ceil_to,
)
from grng_kernels.kron_factor.triton_kernel import _tile_position


class Config(NamedTuple):
    """Tile sizes and launch parameters; ``hopper_warps`` is for sm_90 and later."""

    block: int
    block_k: int
    num_warps: int
    hopper_warps: int
    num_stages: int


# Orders from here on are padded to a multiple of 128 and use the larger tile where there is one. The choice
# follows the order of a matrix alone.
LARGE = 513
LARGE_TILE = 128
# Chosen by reasoning, not yet by measurement; no spills for sm_80, sm_90 and sm_100
# (tests/aot/test_damped_inverse_large_aot.py). Tiles of 128 in tf32x3 keep too little room for stages.
CONFIGS = {
    "bf16": (Config(64, 64, 4, 4, 3), Config(128, 64, 8, 4, 3)),
    "bf16x3": (Config(64, 32, 4, 4, 3), Config(128, 32, 8, 8, 3)),
    "tf32": (Config(64, 32, 4, 4, 3), Config(128, 32, 8, 8, 3)),
    "tf32x3": (Config(64, 32, 4, 4, 3), Config(64, 32, 4, 4, 3)),
}
# One product with the identity turns any tile into both of its triangles.
RESIDUAL, APPLY, FIRST_RESIDUAL, FIRST_APPLY = range(4)
_RESIDUAL, _APPLY, _FIRST_RESIDUAL, _FIRST_APPLY = map(tl.constexpr, range(4))


@triton.jit
def _write(ptr, at, values, mask, mirrored, turned, turned_mask, MIRROR: tl.constexpr):
    tl.store(ptr + at, values, mask=mask)
    if MIRROR:
        tl.store(ptr + mirrored, turned, mask=turned_mask)


@triton.jit(do_not_specialize=["count"])
def _product_kernel(
    table_ptr,
    ends_ptr,
    state_ptr,
    left_ptr,
    left_low_ptr,
    right_ptr,
    right_low_ptr,
    addend_ptr,
    wide_ptr,
    high_ptr,
    low_ptr,
    start,
    first_a,
    first_b,
    a,
    b,
    count,
    MODE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    PAIR: tl.constexpr = PRECISION == "bf16x3"
    MIRROR: tl.constexpr = MODE != _RESIDUAL
    index, tile = _find(ends_ptr, count, tl.program_id(0), CHUNK)
    row = table_ptr + index * _FIELDS
    padded = tl.multiple_of(tl.load(row + _PADDED).to(tl.int32), 64)
    square = tl.multiple_of(tl.load(row + _SQUARE), 64)
    if MIRROR:
        tile_m, tile_n = _tile_position(tile)
    else:
        side = padded // BLOCK
        tile_m, tile_n = tile // side, tile % side
    offs_m = tile_m * BLOCK + tl.arange(0, BLOCK)
    offs_n = tile_n * BLOCK + tl.arange(0, BLOCK)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)[None, :]
    at_left = square + offs_m.to(tl.int64)[:, None] * padded + offs_k
    at_right = square + offs_n.to(tl.int64)[:, None] * padded + offs_k
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for k in range(0, padded, BLOCK_K):
        x, y = tl.load(left_ptr + at_left + k), tl.load(right_ptr + at_right + k)
        if UPCAST:
            x, y = x.to(tl.float32), y.to(tl.float32)
        if PAIR:
            x_low, y_low = (
                tl.load(left_low_ptr + at_left + k),
                tl.load(right_low_ptr + at_right + k),
            )
            if UPCAST:
                x_low, y_low = x_low.to(tl.float32), y_low.to(tl.float32)
            acc = tl.dot(x_low, tl.trans(y), acc)
            acc = tl.dot(x, tl.trans(y_low), acc)
            acc = tl.dot(x, tl.trans(y), acc)
        elif PRECISION == "bf16":
            acc = tl.dot(x, tl.trans(y), acc)
        else:
            acc = tl.dot(x, tl.trans(y), acc, input_precision=PRECISION)

    rows, columns = offs_m[:, None], offs_n[None, :]
    at = square + rows.to(tl.int64) * padded + columns.to(tl.int64)
    identity = tl.where(rows == columns, 1.0, 0.0)
    # X = p I + q B after the first step.
    scale = start / tl.load(state_ptr + index * _STATE + _TOP)
    p, q = scale * first_a, scale * scale * first_b
    if MODE == _RESIDUAL:
        result = identity - acc
    elif MODE == _FIRST_RESIDUAL:
        result = identity - (p * tl.load(addend_ptr + at) + q * acc)
    elif MODE == _APPLY:
        result = (a + b) * tl.load(addend_ptr + at) - b * acc
    else:
        rest = tl.load(right_ptr + at).to(tl.float32)
        if PAIR:
            rest += tl.load(right_low_ptr + at).to(tl.float32)
        result = (a + b) * (p * identity + q * tl.load(addend_ptr + at))
        result -= b * (p * rest + q * acc)
    lower = columns <= rows
    turned, turned_lower = result, lower
    mirrored = at
    if MIRROR:
        # Both triangles from one value, also in the tiles on the diagonal.
        turned = tl.trans(result)
        rows, columns = offs_n[:, None], offs_m[None, :]
        mirrored = square + rows.to(tl.int64) * padded + columns.to(tl.int64)
        turned_lower = rows < columns
    else:
        lower = (rows >= 0) & (columns >= 0)
    if WIDE:
        _write(wide_ptr, at, result, lower, mirrored, turned, turned_lower, MIRROR)
    if HIGH:
        high, turned_high = _rounded(result), _rounded(turned)
        _write(
            high_ptr, at, high.to(tl.bfloat16), lower,
            mirrored, turned_high.to(tl.bfloat16), turned_lower, MIRROR,
        )  # fmt: skip
        if LOW:
            _write(
                low_ptr, at, _rounded(result - high).to(tl.bfloat16), lower,
                mirrored, _rounded(turned - turned_high).to(tl.bfloat16), turned_lower, MIRROR,
            )  # fmt: skip


supports = triton_prologue.supports


class Buffers(NamedTuple):
    """One square matrix in each of the forms that products read: fp32, bf16, and what bf16 leaves over."""

    wide: Tensor
    high: Tensor
    low: Tensor


class Product(NamedTuple):
    """One launch for each tile size: what it computes and in which forms the result is written."""

    mode: int
    step: Step
    precision: str
    wide: bool
    high: bool
    low: bool


class Schedule(NamedTuple):
    """All products of a call, and what they start from."""

    start: float
    first: Step
    products: list[Product]


def forms(*precisions: str) -> tuple[bool, bool, bool]:
    """Return in which forms an operand of products in these precisions is read: fp32, bf16, the rest."""
    return (
        any(p.startswith("tf32") for p in precisions),
        any(p.startswith("bf16") for p in precisions),
        "bf16x3" in precisions,
    )


def products_of(plan: Plan) -> Schedule:
    """Return the products of a plan; one that ends at once gets a step more, so that there are some."""
    steps = list(plan.steps)
    while len(steps) < 2:
        steps.append(Step(2.0, -1.0, "tf32x3", "tf32x3"))
    first, *rest = steps
    products = []
    for i, step in enumerate(rest):
        now = (FIRST_RESIDUAL, FIRST_APPLY) if i == 0 else (RESIDUAL, APPLY)
        products.append(Product(now[0], step, step.residual_precision, *forms(step.precision)))
        after = rest[i + 1] if i + 1 < len(rest) else None
        _, high, low = forms(*(after[2:4] if after else ()))
        # What is added up stays in fp32, and so does the result.
        products.append(Product(now[1], step, step.precision, True, high, low))
    return Schedule(plan.start, first, products)


def padded_order(n: int) -> int:
    """Return the order that a matrix is padded to: a multiple of its tile."""
    return ceil_to(n, LARGE_TILE if n >= LARGE else TILE)


def _triangle(side: int) -> int:
    return side * (side + 1) // 2


def _segments(sides: list[int]) -> list[triton_prologue.Counts]:
    """Return full and lower tiles: all matrices in small tiles, then the large ones, then the others."""
    large = sum(side >= LARGE for side in sides)
    found = []
    for first, part, tile in (
        (0, sides, TILE),
        (0, sides[:large], LARGE_TILE),
        (large, sides[large:], TILE),
    ):
        counts = [side // tile for side in part] or [0]
        found += [(first, [c * c for c in counts]), (first, [_triangle(c) for c in counts])]
    return found


def launches_of(product: Product, segments: Sequence[Segment]) -> list[tuple[Segment, Config]]:
    """Return the launches of one product: two where large and other matrices take different tiles."""
    small, large = CONFIGS[product.precision]
    which = int(product.mode != RESIDUAL)
    if small == large:
        found = [(segments[which], small)]
    else:
        found = [(segments[2 + which], large), (segments[4 + which], small)]
    return [(segment, config) for segment, config in found if segment.programs]


def product_constants(product: Product, config: Config) -> dict[str, Any]:
    """Return the compile-time arguments of ``_product_kernel``."""
    return {
        "MODE": product.mode,
        "PRECISION": product.precision,
        "WIDE": product.wide,
        "HIGH": product.high,
        "LOW": product.low,
        # The interpreter multiplies the bit patterns of bf16.
        "UPCAST": interpreting_triton() and product.precision.startswith("bf16"),
        "BLOCK": config.block,
        "BLOCK_K": config.block_k,
        "CHUNK": CHUNK,
    }


def warps_of(config: Config, device: torch.device) -> int:
    """Return the warps of a program on this device."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return config.num_warps
    return config.hopper_warps


def launch(entries: Sequence[Entry], *, rho: float | None) -> None:
    """Invert the damped matrices of all entries, with no host sync; can be captured in a graph.

    Launches: 21 before, one for each product (two where orders below and above 512 meet), and 3 after. At
    ``rho`` 1e-2 there are 8 products. Their number follows from ``rho`` and the orders alone. Workspace, in bytes for each
    element of a padded matrix: 6 for the damped matrix and at most 18 for the iterate and the residual; 16 in
    all at ``rho`` 1e-2.

    Args:
        entries: Of any orders that are supported; fp32, bf16 or fp16, any strides.
        rho: As in ``damped_inverse``; must be given.
    """
    assert rho is not None, "the public function asks for rho with newton_schulz"
    if not entries:
        return
    start, first, products = products_of(newton_schulz_plan(rho))
    batch = triton_prologue.batch_of("newton_schulz", entries, padded_order, _segments)
    device = batch.table.device
    precisions = [product.precision for product in products]
    pair = "bf16x3" in precisions
    halves = any(p.startswith("bf16") for p in precisions)
    # A product that reads the iterate in fp32 cannot write it in place.
    both = any(p.mode == APPLY and p.precision.startswith("tf32") for p in products)

    def empty(wanted: bool, dtype: torch.dtype) -> Tensor:
        return torch.empty(batch.squares if wanted else 0, dtype=dtype, device=device)

    def buffers(wide: bool, high: bool) -> Buffers:
        return Buffers(
            empty(wide, torch.float32),
            empty(high, torch.bfloat16),
            empty(high and pair, torch.bfloat16),
        )

    with torch.cuda.device_of(batch.table):
        matrices = triton_prologue.prologue(batch, rho=rho, low=pair)
        b = Buffers(matrices.wide, matrices.high, matrices.low)
        x, other = buffers(True, halves), buffers(both, halves)
        if not both:
            other = other._replace(wide=x.wide)
        s = buffers(any(p.wide for p in products[::2]), any(p.high for p in products[::2]))
        for product in products:
            left = b if product.mode in (FIRST_RESIDUAL, FIRST_APPLY) else x
            right = b if product.mode in (FIRST_RESIDUAL, RESIDUAL) else s
            out = s if product.mode in (FIRST_RESIDUAL, RESIDUAL) else other
            exact = product.precision.startswith("tf32")
            for segment, config in launches_of(product, batch.segments):
                _product_kernel[(segment.programs,)](
                    segment.table, segment.ends, matrices.state,
                    left.wide if exact else left.high, left.low,
                    right.wide if exact else right.high, right.low,
                    left.wide, out.wide, out.high, out.low,
                    start, first.a, first.b, product.step.a, product.step.b, segment.count,
                    **product_constants(product, config),
                    num_warps=warps_of(config, device),
                    num_stages=config.num_stages,
                )  # fmt: skip
            if product.mode in (FIRST_APPLY, APPLY):
                x, other = other, x
        epilogue(batch, matrices, x.wide)

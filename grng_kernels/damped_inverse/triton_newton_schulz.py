# SPDX-License-Identifier: Apache-2.0
"""Newton-Schulz for large matrices on the GPU: one launch per product for all matrices of a call.

With ``S = I - X B``, the transpose of the residual ``E = I - B X``, both products of a step read their two
operands along rows: ``S_ij = I_ij - sum_k X_ik B_jk`` and ``(X E)_ij = sum_k X_ik S_jk``, because ``B`` and
``X`` are bitwise symmetric. ``S`` is computed in full from the original ``B`` and never symmetrised;
``X <- (a + b) X - b X E`` is computed in the lower triangle and written to both sides.

The first step starts from ``X = c I`` and gives ``p I + q B``, which is never stored: the second one reads
``B`` instead, and its ``S = I - p B - q B B`` is symmetric by itself.

The last ``S`` decides how accurate the result is: whatever rounding adds to it stays. There both diagonals,
which hold the largest elements, are kept out of the product, and what they contribute is added with all
rounding errors collected (``triton_compensated.py``).

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
from grng_kernels.damped_inverse.triton_compensated import _last_residual
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
    """Tile sizes and launch parameters."""

    block: int
    block_k: int
    num_warps: int
    num_stages: int


# Orders from here on are padded to a multiple of 128 and use the larger tile where there is one. The choice
# follows the order of a matrix alone.
LARGE = 513
LARGE_TILE = 128
# Chosen by reasoning, not yet by measurement; no spills for sm_80, sm_90 and sm_100
# (tests/aot/test_damped_inverse_large_aot.py). A tile of 128 spills in tf32x3 and bf16x3 before sm_90;
# and where the result is written to both sides, in tf32x3 or as two bf16 numbers.
CONFIGS = {
    "bf16": (Config(64, 64, 4, 3), Config(128, 64, 8, 3)),
    "bf16x3": (Config(64, 32, 8, 3), Config(128, 32, 8, 3)),
    "tf32": (Config(64, 32, 4, 3), Config(128, 32, 8, 3)),
    "tf32x3": (Config(64, 32, 4, 3), Config(128, 32, 8, 2)),
}
# Of the last residual: three tiles leave no room for the larger one. Tensor cores cut sums off where
# fp32 rounds them, always towards zero; what leaves them after 16 columns is added up with rounding.
LAST_CONFIG = Config(64, 16, 4, 4)
# Columns of a tile that are turned over at a time.
TURN = 32
# What a product is for; the first two products of a call read X as p I + q B.
RESIDUAL, APPLY, FIRST_RESIDUAL, FIRST_APPLY, LAST_RESIDUAL = range(5)
_RESIDUAL, _APPLY, _FIRST_RESIDUAL, _FIRST_APPLY, _LAST_RESIDUAL = map(tl.constexpr, range(5))
# Those whose result is not symmetric, and so computed in full.
FULL = (RESIDUAL, LAST_RESIDUAL)
# One Newton step whose error is the rounding of the last residual.
CORRECTION = Step(2.0, -1.0, "tf32x3", "tf32")


@triton.jit
def _mirror(tile_ptr, back, padded, diagonal, BLOCK: tl.constexpr, TURN: tl.constexpr):
    # The tile that this program has just written, turned over, a few columns at a time: as a whole it would
    # take more registers than there are. On the diagonal the lower triangle stays.
    along, across = tl.arange(0, BLOCK), tl.arange(0, TURN)
    for start in range(0, BLOCK, TURN):
        columns = start + across
        x = tl.load(tile_ptr + along[:, None] * padded + columns[None, :])
        mask = (columns[:, None] < along[None, :]) | (not diagonal)
        tl.store(
            tile_ptr + back + columns[:, None] * padded + along[None, :], tl.trans(x), mask=mask
        )


@triton.jit
def _store(
    wide_ptr, high_ptr, low_ptr, at, x, WIDE: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr
):
    if WIDE:
        tl.store(wide_ptr + at, x)
    if HIGH:
        high = _rounded(x)
        tl.store(high_ptr + at, high.to(tl.bfloat16))
        if LOW:
            tl.store(low_ptr + at, _rounded(x - high).to(tl.bfloat16))


@triton.jit
def _accumulated(
    left_ptr,
    left_low_ptr,
    right_ptr,
    right_low_ptr,
    padded,
    first_m,
    first_n,
    MODE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    lines, step = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_K)[None, :]
    along = tl.arange(0, BLOCK)[:, None] * padded + tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for k in range(0, padded, BLOCK_K):
        x, y = tl.load(left_ptr + along + k), tl.load(right_ptr + along + k)
        if UPCAST:
            x, y = x.to(tl.float32), y.to(tl.float32)
        if MODE == _LAST_RESIDUAL:
            x = tl.where(first_m + lines == k + step, 0.0, x)
            y = tl.where(first_n + lines == k + step, 0.0, y)
        if PRECISION == "bf16x3":
            x_low, y_low = tl.load(left_low_ptr + along + k), tl.load(right_low_ptr + along + k)
            if UPCAST:
                x_low, y_low = x_low.to(tl.float32), y_low.to(tl.float32)
            acc = tl.dot(x_low, tl.trans(y), acc)
            acc = tl.dot(x, tl.trans(y_low), acc)
            acc = tl.dot(x, tl.trans(y), acc)
        elif PRECISION == "bf16":
            acc = tl.dot(x, tl.trans(y), acc)
        else:
            acc = tl.dot(x, tl.trans(y), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _combined(
    acc,
    identity,
    addend,
    right,
    right_low,
    p,
    q,
    a,
    b,
    MODE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # What the product is needed for; X = p I + q B after the first step.
    if MODE == _RESIDUAL:
        result = identity - acc
    elif MODE == _FIRST_RESIDUAL:
        result = identity - (p * tl.load(addend) + q * acc)
    elif MODE == _APPLY:
        result = (a + b) * tl.load(addend) - b * acc
    else:
        result = (a + b) * (p * identity + q * tl.load(addend)) - (b * q) * acc
        # S itself, in the form in which the product read it.
        result -= (b * p) * tl.load(right).to(tl.float32)
        if PRECISION == "bf16x3":
            result -= (b * p) * tl.load(right_low).to(tl.float32)
    return result


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
    TURN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    MIRROR: tl.constexpr = (MODE != _RESIDUAL) & (MODE != _LAST_RESIDUAL)
    index, tile = _find(ends_ptr, count, tl.program_id(0), CHUNK)
    row = table_ptr + index * _FIELDS
    padded = tl.multiple_of(tl.load(row + _PADDED).to(tl.int32), 64)
    square = tl.multiple_of(tl.load(row + _SQUARE), 64)
    if MIRROR:
        tile_m, tile_n = _tile_position(tile)
    else:
        side = padded // BLOCK
        tile_m, tile_n = tile // side, tile % side
    inside = tl.arange(0, BLOCK)
    # From a 64-bit place, offsets inside a stripe of tiles: they fit in 32 bits up to orders of 16 million.
    stripe_m = square + (tile_m * BLOCK).to(tl.int64) * padded
    stripe_n = square + (tile_n * BLOCK).to(tl.int64) * padded
    acc = _accumulated(
        left_ptr + stripe_m, left_low_ptr + stripe_m, right_ptr + stripe_n, right_low_ptr + stripe_n,
        padded, tile_m * BLOCK, tile_n * BLOCK, MODE, PRECISION, UPCAST, BLOCK, BLOCK_K,
    )  # fmt: skip

    at = inside[:, None] * padded + inside[None, :]
    here = stripe_m + tile_n * BLOCK
    identity = tl.where(inside[:, None] - inside[None, :] == (tile_n - tile_m) * BLOCK, 1.0, 0.0)
    if MODE == _LAST_RESIDUAL:
        on_m = stripe_m + tile_m * BLOCK + inside * (padded + 1)
        on_n = stripe_n + tile_n * BLOCK + inside * (padded + 1)
        result = _last_residual(
            acc, identity, tl.load(left_ptr + here + at), tl.load(right_ptr + here + at),
            tl.load(left_ptr + on_m), tl.load(right_ptr + on_n),
        )  # fmt: skip
    else:
        scale = start / tl.load(state_ptr + index * _STATE + _TOP)
        result = _combined(
            acc, identity, addend_ptr + here + at, right_ptr + here + at, right_low_ptr + here + at,
            scale * first_a, scale * scale * first_b, a, b, MODE, PRECISION,
        )  # fmt: skip
    _store(
        wide_ptr + here, high_ptr + here, low_ptr + here, at, result, WIDE, HIGH, LOW
    )  # fmt: skip
    if MIRROR:
        back = stripe_n + tile_m * BLOCK - here
        diagonal = tile_m == tile_n
        tl.debug_barrier()
        if WIDE:
            _mirror(wide_ptr + here, back, padded, diagonal, BLOCK, TURN)
        if HIGH:
            _mirror(high_ptr + here, back, padded, diagonal, BLOCK, TURN)
        if LOW:
            _mirror(low_ptr + here, back, padded, diagonal, BLOCK, TURN)


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
    """Return the products of a plan; one that ends at once gets more, so that the last is a correction."""
    steps = list(plan.steps)
    while len(steps) < 3:
        steps.append(CORRECTION)
    first, *rest = steps
    products = []
    for i, step in enumerate(rest):
        now = (FIRST_RESIDUAL, FIRST_APPLY) if i == 0 else (RESIDUAL, APPLY)
        if i == len(rest) - 1 and step.residual_precision == "tf32x3":
            now = (LAST_RESIDUAL, APPLY)
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


def launches_of(
    product: Product, segments: Sequence[Segment], before_hopper: bool
) -> list[tuple[Segment, Config]]:
    """Return the launches of one product: two where large and other matrices take different tiles."""
    small, large = configs_of(product, before_hopper)
    which = int(product.mode not in FULL)
    if small == large:
        found = [(segments[which], small)]
    else:
        found = [(segments[2 + which], large), (segments[4 + which], small)]
    return [(segment, config) for segment, config in found if segment.programs]


def configs_of(product: Product, before_hopper: bool) -> tuple[Config, Config]:
    """Return the configs of matrices below and from order ``LARGE``; ``before_hopper`` is before sm_90."""
    if product.mode == LAST_RESIDUAL:
        return LAST_CONFIG, LAST_CONFIG
    small, large = CONFIGS[product.precision]
    spills = before_hopper and product.precision.endswith("x3")
    if product.mode != RESIDUAL:
        spills |= product.low or product.precision == "tf32x3"
    return (small, small) if spills else (small, large)


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
        "TURN": TURN,
        "CHUNK": CHUNK,
    }


def launch(entries: Sequence[Entry], *, rho: float | None) -> None:
    """Invert the damped matrices of all entries, with no host sync; can be captured in a graph.

    Launches: 21 before, one for each product (two where orders below and above 512 meet), and 3 after; 8
    products at ``rho`` 1e-2. Workspace: at most 32 bytes for each element of a padded matrix (the damped
    matrix, the iterate twice, the residual), 16 where all products that change the iterate are in bf16.

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

    before_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)
    with torch.cuda.device_of(batch.table):
        matrices = triton_prologue.prologue(batch, rho=rho, low=pair)
        b = Buffers(matrices.wide, matrices.high, matrices.low)
        x, other = buffers(True, halves), buffers(both, halves)
        if not both:
            other = other._replace(wide=x.wide)
        s = buffers(any(p.wide for p in products[::2]), any(p.high for p in products[::2]))
        for product in products:
            left = b if product.mode in (FIRST_RESIDUAL, FIRST_APPLY) else x
            residual = product.mode in (FIRST_RESIDUAL, *FULL)
            right, out = (b, s) if residual else (s, other)
            exact = product.precision.startswith("tf32")
            for segment, config in launches_of(product, batch.segments, before_hopper):
                _product_kernel[(segment.programs,)](
                    segment.table, segment.ends, matrices.state,
                    left.wide if exact else left.high, left.low,
                    right.wide if exact else right.high, right.low,
                    left.wide, out.wide, out.high, out.low,
                    start, first.a, first.b, product.step.a, product.step.b, segment.matrices,
                    **product_constants(product, config),
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                )  # fmt: skip
            if product.mode in (FIRST_APPLY, APPLY):
                x, other = other, x
        epilogue(batch, matrices, x.wide)

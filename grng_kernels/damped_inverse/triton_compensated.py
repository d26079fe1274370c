# SPDX-License-Identifier: Apache-2.0
"""The residual ``I - X B`` where its error decides that of the inverse: the last one of Newton-Schulz.

The diagonals of ``X`` and of ``B`` hold the largest elements. Kept out of the product, they leave it sums
that are small beside them, and so are its rounding errors. What the diagonals contribute is a few terms for
each element, which are added here with all that rounding drops.
"""

import triton
import triton.language as tl


@triton.jit
def _two_sum(x, y):
    # Knuth: the sum, and what its rounding left.
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


@triton.jit
def _two_product(x, y):
    # Dekker, with halves of 12 bits, whose products are exact: a product that is exact, and the rest.
    x_high = (x.to(tl.int32, bitcast=True) & -0x1000).to(tl.float32, bitcast=True)
    y_high = (y.to(tl.int32, bitcast=True) & -0x1000).to(tl.float32, bitcast=True)
    return x_high * y_high, x_high * (y - y_high) + (x - x_high) * y


@triton.jit
def _last_residual(acc, identity, x, y, x_diagonal, y_diagonal):
    # I - X B, where ``acc`` is the product without both diagonals. On the diagonal of the result the
    # product of the two is in ``x * y_diagonal`` already.
    left = tl.where(identity != 0, 0.0, y)
    first, first_rest = _two_product(x_diagonal[:, None], left)
    second, second_rest = _two_product(x, y_diagonal[None, :])
    total, rest = _two_sum(first, second)
    total, last = _two_sum(total, acc)
    return (identity - total) - ((rest + last) + (first_rest + second_rest))

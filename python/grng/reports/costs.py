# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a layer's curvature, counted from shapes.

Of the products only, a multiplication and an addition being two: what is done element by element is about
what AdamW does too. With factors of order ``n`` of the output side ``o`` and the input side ``i``:

* row: a row of statistics (one position of one example, or one example) adds a triangle, ``n (n + 1)``, to
  each factor, or ``2n`` to a diagonal one;
* refresh: an inverse takes ``n³ + 98n²``, with its residual and the norm that damping is relative to; that of
  a diagonal factor ``4n``;
* step: ``D = P_o G P_i`` takes ``2o²i + 2oi²``; a side with a diagonal factor ``oi`` in place of its part.

Times the blocks of the layer. An input factor that another layer has averaged and inverted costs nothing.
"""

from typing import NamedTuple

from grng.curvature.layers import KroneckerLayer


class Flops(NamedTuple):
    """Floating-point operations: for each row of statistics, of a refresh, and of a step."""

    row: int
    refresh: int
    step: int


def flops_of(layer: KroneckerLayer, *, shares_input: bool = False) -> Flops:
    """Return the operations of a layer; ``shares_input``: another one brings its input factor."""
    out, inp = layer.sizes
    row = refresh = step = 0
    for side, n in enumerate((out, inp)):
        diagonal = layer.diagonal[side]
        step += out * inp if diagonal else 2 * out * inp * n
        if side == 1 and shares_input:
            continue
        row += 2 * n if diagonal else n * (n + 1)
        refresh += 4 * n if diagonal else n**3 + 98 * n**2
    return Flops(layer.blocks * row, layer.blocks * refresh, layer.blocks * step)

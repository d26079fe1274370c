# SPDX-License-Identifier: Apache-2.0
"""The shape of a two-dimensional convolution."""

from typing import NamedTuple


class Conv2dGeometry(NamedTuple):
    """How a convolution moves over its input; pairs are (height, width), as in ``torch.nn.Conv2d``."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the output; 0 where the kernel does not fit in the padded input."""
        out = [
            max((size + 2 * pad - step * (kernel - 1) - 1) // move + 1, 0)
            for size, kernel, move, pad, step in zip((height, width), *self[:4], strict=True)
        ]
        return out[0], out[1]

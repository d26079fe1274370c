# SPDX-License-Identifier: Apache-2.0
"""The geometry of a two-dimensional convolution."""

from typing import NamedTuple

from torch import Tensor


class Conv2dGeometry(NamedTuple):
    """How a convolution visits its input; pairs are (height, width), as in ``torch.nn.Conv2d``."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the number of output lines and columns for an input of that size; may be negative."""
        lines, columns = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                (height, width),
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
                strict=True,
            )
        )
        return lines, columns

    def places(self, x: Tensor) -> int:
        """Return the number of output positions of one image of ``x [B, C, H, W]``."""
        lines, columns = self.output_size(x.shape[2], x.shape[3])
        return lines * columns

    def visited(self, dim: int, tap: int, size: int) -> slice:
        """Return which positions of a dimension of ``size`` one tap of the kernel visits, inside of it."""
        step, start = self.stride[dim], tap * self.dilation[dim] - self.padding[dim]
        outputs = self.output_size(size, size)[dim]
        first = max(0, (step - 1 - start) // step)
        last = min(outputs, (size - start + step - 1) // step)
        return slice(start + first * step, max(start + first * step, start + last * step), step)

    def flat(self) -> list[int]:
        """Return kernel size, stride, padding, dilation and groups as nine numbers."""
        return [*self.kernel_size, *self.stride, *self.padding, *self.dilation, self.groups]

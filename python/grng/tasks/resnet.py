# SPDX-License-Identifier: Apache-2.0
"""A small residual network for square images of one channel (He et al. 2016, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F


def _conv(width_in: int, width_out: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    # No bias: the batch normalisation that follows subtracts any constant.
    padding = kernel_size // 2
    return nn.Conv2d(width_in, width_out, kernel_size, stride, padding, bias=False)


class BasicBlock(nn.Module):
    """``relu(x + norm(conv(relu(norm(conv(x))))))``, with 3x3 convolutions."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        """Args: width_in, width_out: channels; stride: of the first convolution."""
        super().__init__()
        self.conv1 = _conv(width_in, width_out, 3, stride)
        self.norm1 = nn.BatchNorm2d(width_out)
        self.conv2 = _conv(width_out, width_out, 3)
        self.norm2 = nn.BatchNorm2d(width_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width_out:
            self.shortcut = nn.Sequential(
                _conv(width_in, width_out, 1, stride), nn.BatchNorm2d(width_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """The block.

        Args:
            x: ``[n, width_in, side, side]``.

        Returns:
            ``[n, width_out, side / stride, side / stride]``, rounded up.
        """
        inner = F.relu(self.norm1(self.conv1(x)))
        inner = self.norm2(self.conv2(inner))
        return F.relu(inner + self.shortcut(x))


class ResNet(nn.Module):
    """A 3x3 convolution, one basic block per width, mean over the positions, linear head.

    Every block but the first halves the sides of the image.
    """

    def __init__(self, side: int, widths: Sequence[int], classes: int) -> None:
        """Args: side: of the images; widths: channels of the blocks; classes: of the head."""
        super().__init__()
        self.side = side
        self.stem = nn.Sequential(_conv(1, widths[0], 3), nn.BatchNorm2d(widths[0]), nn.ReLU())
        blocks = [BasicBlock(widths[0], widths[0], stride=1)]
        blocks += [BasicBlock(before, after, stride=2) for before, after in pairwise(widths)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Class logits.

        Args:
            pixels: ``[n, side * side]`` fp32, row by row.

        Returns:
            ``[n, classes]``.
        """
        images = pixels.unflatten(1, (1, self.side, self.side))
        features: Tensor = self.blocks(self.stem(images))  # [n, widths[-1], side / 4, side / 4]
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits

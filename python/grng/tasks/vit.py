# SPDX-License-Identifier: Apache-2.0
"""A small vision transformer for square images of one channel (Dosovitskiy et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from grng.tasks.transformer import POSITION_STD, Block


class VisionTransformer(nn.Module):
    """Patches through a linear layer, learned positions, blocks, mean over the patches, linear head."""

    def __init__(
        self,
        side: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: int,
        classes: int,
    ) -> None:
        """Args: side: of the images, a multiple of patch; depth: blocks; classes: of the head."""
        super().__init__()
        self.patch, self.patches_per_side = patch, side // patch
        self.embed = nn.Linear(patch * patch, width)
        self.positions = nn.Parameter(POSITION_STD * torch.randn(self.patches_per_side**2, width))
        self.blocks = nn.Sequential(
            *(Block(width, heads, mlp_ratio, is_causal=False) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def split(self, pixels: Tensor) -> Tensor:
        """Images cut into squares.

        Args:
            pixels: ``[n, side * side]``, row by row.

        Returns:
            ``[n, patches, patch * patch]``, patches and the pixels of each row by row.
        """
        shape = (self.patches_per_side, self.patch, self.patches_per_side, self.patch)
        return pixels.unflatten(1, shape).transpose(2, 3).flatten(3).flatten(1, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        """Class logits.

        Args:
            pixels: ``[n, side * side]`` fp32, row by row.

        Returns:
            ``[n, classes]``.
        """
        tokens = self.embed(self.split(pixels)) + self.positions  # [n, patches, width]
        tokens = self.norm(self.blocks(tokens))
        logits: Tensor = self.head(tokens.mean(dim=1))
        return logits

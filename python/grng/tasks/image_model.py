# SPDX-License-Identifier: Apache-2.0
"""A head on top of a pretrained vision transformer, and what images need to enter it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What ViT-B/16 of ImageNet-21k was trained on, of every channel: from -1 to 1.
_MEAN = _STD = 0.5
_LARGEST_PIXEL = 255.0


class Enter(nn.Module):
    """Bytes to normalised numbers, enlarged where they are smaller than the encoder's images.

    On the device of the model, so that images can be kept and moved as small as they are.
    """

    def __init__(self, side: int) -> None:
        """Args: side: pixels of each side of the encoder's images."""
        super().__init__()
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        """The encoder's input.

        Args:
            images: ``[n, 3, s, s]`` uint8.

        Returns:
            ``[n, 3, side, side]`` fp32, bilinear between the pixels.
        """
        pixels = images.to(torch.float32).div_(_LARGEST_PIXEL).sub_(_MEAN).div_(_STD)
        if pixels.shape[-1] == self.side:
            return pixels
        size = (self.side, self.side)
        return F.interpolate(pixels, size, mode="bilinear", align_corners=False)


class ImageClassifier(nn.Module):
    """Class logits from images of bytes; a fresh linear head on the state of the class token."""

    def __init__(self, encoder: nn.Module, width: int, classes: int, *, side: int) -> None:
        """Args: encoder: gives ``last_hidden_state`` of this width; side: of its images."""
        super().__init__()
        self.enter = Enter(side)
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits.

        Args:
            images: ``[n, 3, s, s]`` uint8.

        Returns:
            ``[n, classes]``.
        """
        states = self.encoder(pixel_values=self.enter(images)).last_hidden_state
        logits: Tensor = self.head(states[:, 0])
        return logits

# SPDX-License-Identifier: Apache-2.0
"""A small decoder-only transformer that predicts the next character (as GPT-2, without dropout)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from grng.tasks.transformer import POSITION_STD, Block


class CharTransformer(nn.Module):
    """Embeddings of characters and positions, causal blocks, linear head with weights of its own."""

    def __init__(
        self, alphabet: int, context: int, width: int, depth: int, heads: int, mlp_ratio: int
    ) -> None:
        """Args: alphabet: number of characters; context: most characters seen; depth: blocks."""
        super().__init__()
        self.characters = nn.Embedding(alphabet, width)
        self.positions = nn.Parameter(POSITION_STD * torch.randn(context, width))
        self.blocks = nn.Sequential(
            *(Block(width, heads, mlp_ratio, is_causal=True) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, alphabet)

    def forward(self, characters: Tensor) -> Tensor:
        """Logits of the character after each.

        Args:
            characters: ``[n, length]`` int64, at most ``context`` long.

        Returns:
            ``[n, length, alphabet]``; those of a place depend on nothing after it.
        """
        x = self.characters(characters) + self.positions[: characters.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits

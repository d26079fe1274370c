# SPDX-License-Identifier: Apache-2.0
"""The pre-norm transformer block that the models of images and of characters share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

# Of the learned positions at the start, as in GPT-2 and ViT. All else starts as torch starts it.
POSITION_STD = 0.02


class Attention(nn.Module):
    """Softmax attention with several heads; linear layers of its own, no fused module."""

    def __init__(self, width: int, heads: int, *, is_causal: bool) -> None:
        """Args: width: a multiple of heads; is_causal: each token sees itself and those before."""
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """What each token reads from the others.

        Args:
            x: ``[n, tokens, width]``.

        Returns:
            ``[n, tokens, width]``.
        """
        by_head = self.qkv(x).unflatten(2, (3, self.heads, -1))  # [n, tokens, 3, heads, head width]
        q, k, v = by_head.permute(2, 0, 3, 1, 4)  # each [n, heads, tokens, head width]
        read = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        projected: Tensor = self.proj(read.transpose(1, 2).flatten(2))
        return projected


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, *, is_causal: bool) -> None:
        """Args: mlp_ratio: hidden width of the MLP in widths of the block; others: see Attention."""
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, is_causal=is_causal)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, mlp_ratio * width)
        self.contract = nn.Linear(mlp_ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The block.

        Args:
            x: ``[n, tokens, width]``.

        Returns:
            ``[n, tokens, width]``.
        """
        x = x + self.attention(self.norm1(x))
        hidden = F.gelu(self.expand(self.norm2(x)))
        added: Tensor = self.contract(hidden)
        return x + added

# SPDX-License-Identifier: Apache-2.0
"""A head on top of a pretrained text encoder of transformers."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn


class SentenceClassifier(nn.Module):
    """Class logits, or a number, from padded token ids; a fresh linear head on the pooled states."""

    def __init__(
        self,
        encoder: nn.Module,
        width: int,
        outputs: int,
        *,
        pad_id: int = 0,
        pool: Literal["mean", "first"] = "mean",
    ) -> None:
        """Keeps the encoder and draws the head from torch's global generator.

        Args:
            encoder: Gives ``last_hidden_state``.
            width: Of that state.
            outputs: Of the head.
            pad_id: Token that fills up the right of short samples.
            pool: ``"mean"`` of the states of a sample, or the state of its ``"first"`` token.
        """
        super().__init__()
        self.encoder = encoder
        self.pad_id, self.pool = pad_id, pool
        self.head = nn.Linear(width, outputs)

    def forward(self, token_ids: Tensor) -> Tensor:
        """The encoder's states of the tokens that are no padding, pooled, then the head.

        Args:
            token_ids: ``[n, tokens]`` int64, padded at the right.

        Returns:
            ``[n, outputs]``.
        """
        mask = token_ids.ne(self.pad_id)
        if token_ids.device.type == "cpu":
            # Columns of padding alone cost time and change nothing. On CUDA the look would wait.
            longest = max(1, int(mask.sum(dim=1).max())) if len(mask) else 1
            token_ids, mask = token_ids[:, :longest], mask[:, :longest]
        states = self.encoder(input_ids=token_ids, attention_mask=mask.long()).last_hidden_state
        pooled = states[:, 0] if self.pool == "first" else _mean(states, mask)
        outputs: Tensor = self.head(pooled)
        return outputs


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(2).to(states.dtype)
    # A sample without any token has the mean 0, not NaN.
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)

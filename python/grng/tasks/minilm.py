# SPDX-License-Identifier: Apache-2.0
"""Sentence classifier: pretrained MiniLM encoder with LoRA, mean pooling, linear head."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from grng.tasks import minilm_files
from grng.tasks.data import DataError

PAD_ID = 0
_TARGETS = ["query", "value"]
# The update is scaled by alpha / r; with alpha = 2 r the scale is the same for every rank.
_ALPHA_PER_RANK = 2


class SentenceClassifier(nn.Module):
    """Class logits of padded token ids; trains the LoRA matrices and the head only."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        """Args: encoder: gives ``last_hidden_state``; width: of that state; classes: of the head."""
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Mean of the encoder's states over the tokens that are no padding, then the head.

        Args:
            token_ids: ``[n, tokens]`` int64, padded with 0 at the right.

        Returns:
            Logits ``[n, classes]``.
        """
        mask = token_ids.ne(PAD_ID)
        if token_ids.device.type == "cpu":
            # Columns of padding alone cost time and change nothing. On CUDA the look would wait.
            longest = max(1, int(mask.sum(dim=1).max())) if len(mask) else 1
            token_ids, mask = token_ids[:, :longest], mask[:, :longest]
        states = self.encoder(input_ids=token_ids, attention_mask=mask.long()).last_hidden_state
        weights = mask.unsqueeze(2).to(states.dtype)
        # A sample without any token has the mean 0, not NaN.
        mean = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
        logits: Tensor = self.head(mean)
        return logits


@functools.cache
def _pretrained() -> dict[str, Tensor]:
    from safetensors.torch import load_file

    weights = load_file(str(minilm_files.obtain() / minilm_files.WEIGHTS))
    # The pooler is not used, and the position ids are a constant that the model makes itself.
    return {
        name: tensor
        for name, tensor in weights.items()
        if not name.startswith("pooler.") and name != "embeddings.position_ids"
    }


def build_model(rank: int, classes: int) -> nn.Module:
    """Pretrained encoder with fresh LoRA matrices on query and value, and a fresh head.

    Dropout is 0 everywhere: a step must depend on nothing but its batch.

    Args:
        rank: Rank r of the LoRA matrices.
        classes: Number of classes.

    Returns:
        The model, on the CPU; fresh weights are drawn from torch's global generator.

    Raises:
        DataError: A library or the package of the weights is missing or damaged.
    """
    minilm_files.require_libraries()
    folder = minilm_files.obtain()
    try:
        import peft
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise DataError(f'the text tasks: {error}; pip install "grng-kernels[tasks]"') from None

    config: Any = BertConfig.from_pretrained(
        folder,
        local_files_only=True,
        attn_implementation="eager",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    encoder: nn.Module = BertModel(config, add_pooling_layer=False)
    encoder.load_state_dict(_pretrained(), strict=True)
    encoder.requires_grad_(False)
    lora = peft.LoraConfig(
        r=rank,
        lora_alpha=_ALPHA_PER_RANK * rank,
        lora_dropout=0.0,
        target_modules=_TARGETS,
        bias="none",
    )
    encoder = peft.inject_adapter_in_model(lora, encoder)
    return SentenceClassifier(encoder, config.hidden_size, classes)


def describe(rank: int) -> str:
    """One phrase for plots and results."""
    return f"MiniLM-L6 with LoRA r {rank} on query and value, mean pooling, linear head"

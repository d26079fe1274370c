# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST images made harder: corrupted, moved, or changed against a model.

Images are ``[n, 784]`` normalised, as the task has them; sizes are in pixels, strengths in parts of the range
black to white. The corruptions are some of those of Hendrycks and Dietterich (2019), in three strengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grng.tasks.fashion_mnist import PIXEL_MEAN, PIXEL_STD

SIDE = 28
STRENGTHS = (1, 2, 3)


def _pixels(images: Tensor) -> Tensor:
    return (images * PIXEL_STD + PIXEL_MEAN).view(-1, 1, SIDE, SIDE)


def _inputs(pixels: Tensor) -> Tensor:
    return (pixels.clamp(0, 1).flatten(1) - PIXEL_MEAN) / PIXEL_STD


def _noise(pixels: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    return pixels + 0.1 * strength * torch.randn(pixels.shape, generator=generator)


def _impulses(pixels: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """Some pixels become black or white."""
    drawn = torch.rand(pixels.shape, generator=generator)
    part = 0.03 * strength
    return torch.where(drawn < part, 0.0, torch.where(drawn > 1 - part, 1.0, pixels))


def _blur(pixels: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    del generator
    sigma, reach = 0.5 * strength, 4
    places = torch.arange(-reach, reach + 1, dtype=pixels.dtype)
    weights = torch.exp(-places.square() / (2 * sigma**2))
    weights = weights / weights.sum()
    kernel = torch.outer(weights, weights).view(1, 1, 2 * reach + 1, 2 * reach + 1)
    return F.conv2d(pixels, kernel, padding=reach)


def _contrast(pixels: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    del generator
    mean = pixels.mean(dim=(2, 3), keepdim=True)
    return mean + (pixels - mean) * (0.7, 0.5, 0.3)[strength - 1]


def _patch(pixels: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """A grey square somewhere in the image."""
    size = 4 + 2 * strength
    first = torch.randint(0, SIDE - size + 1, (2, len(pixels), 1, 1, 1), generator=generator)
    rows = torch.arange(SIDE).view(1, 1, SIDE, 1)
    columns = torch.arange(SIDE).view(1, 1, 1, SIDE)
    is_inside = (rows >= first[0]) & (rows < first[0] + size)
    is_inside = is_inside & (columns >= first[1]) & (columns < first[1] + size)
    return torch.where(is_inside, 0.5, pixels)


def _affine(pixels: Tensor, angle: Tensor, move: Tensor) -> Tensor:
    """Rotate by ``angle [n]`` (radians) and move by ``move [n, 2]`` pixels; black comes in."""
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    offset = (2.0 * move / SIDE).unsqueeze(2)
    grid = F.affine_grid(
        torch.cat([matrix, offset], dim=2), list(pixels.shape), align_corners=False
    )
    return F.grid_sample(pixels, grid, align_corners=False)


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).float() * 2 - 1


def _move(pixels: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """By one pixel for each strength along both axes."""
    move = strength * _signs((len(pixels), 2), generator)
    return _affine(pixels, torch.zeros(len(pixels)), move)


def _rotate(pixels: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """By ten degrees for each strength."""
    angle = math.radians(10 * strength) * _signs((len(pixels),), generator)
    return _affine(pixels, angle, torch.zeros(len(pixels), 2))


CORRUPTIONS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "noise": _noise,
    "impulses": _impulses,
    "blur": _blur,
    "contrast": _contrast,
    "patch": _patch,
}
SHIFTS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "moved": _move,
    "rotated": _rotate,
}


def perturbed(images: Tensor, name: str, strength: int) -> Tensor:
    """The same samples made harder in one way.

    Args:
        images: ``[n, 784]``.
        name: A key of ``CORRUPTIONS`` or ``SHIFTS``.
        strength: 1, 2 or 3.

    Returns:
        ``[n, 784]``, the same for the same arguments.
    """
    generator = torch.Generator().manual_seed(1000 + strength)
    change = (CORRUPTIONS | SHIFTS)[name]
    return _inputs(change(_pixels(images), strength, generator))


def attacked(model: nn.Module, images: Tensor, labels: Tensor, size: float, steps: int) -> Tensor:
    """Images changed by at most ``size`` in each pixel so that the loss of a model rises.

    One step is the fast gradient sign method (Goodfellow et al. 2015), more are projected gradient descent
    from the image itself, with steps of ``2.5·size/steps`` (Madry et al. 2018).

    Args:
        model: In evaluation mode; its parameters are left alone.
        images: ``[n, 784]``.
        labels: ``[n]``.
        size: In parts of the range from black to white.
        steps: Gradient steps, >= 1.

    Returns:
        ``[n, 784]``, inside the range of pixels.
    """
    clean = _pixels(images)
    pixels = clean.clone()
    length = size if steps == 1 else 2.5 * size / steps
    for _ in range(steps):
        pixels.requires_grad_()
        loss = F.cross_entropy(model(_inputs(pixels)), labels, reduction="sum")
        (grad,) = torch.autograd.grad(loss, pixels)
        with torch.no_grad():
            pixels = pixels + length * grad.sign()
            pixels = torch.minimum(torch.maximum(pixels, clean - size), clean + size).clamp(0, 1)
    return _inputs(pixels)

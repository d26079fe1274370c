# SPDX-License-Identifier: Apache-2.0
"""What the studies measure: gradients, Hessians, harder images, wrong labels, values at equal accuracy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import study_tables  # noqa: E402
from studies import gradient_norm, label_noise, measures, perturbations, training  # noqa: E402
from studies.definition import Options  # noqa: E402

from grng.tasks.fashion_mnist import PIXEL_MEAN, PIXEL_STD  # noqa: E402

KINDS = pytest.mark.parametrize("name", [*perturbations.CORRUPTIONS, *perturbations.SHIFTS])


@pytest.fixture
def images() -> Tensor:
    """A white square in the middle of black images, with a grey side, so that nothing is symmetric."""
    torch.manual_seed(0)
    pixels = torch.zeros(8, 28, 28)
    pixels[:, 8:20, 8:20] = 1.0
    pixels[:, 8:20, 8:11] = 0.5
    return (pixels.flatten(1) - PIXEL_MEAN) / PIXEL_STD


def pixels_of(images: Tensor) -> Tensor:
    return images * PIXEL_STD + PIXEL_MEAN


@KINDS
def test_harder_images_are_images_and_always_the_same(images: Tensor, name: str) -> None:
    before = images.clone()
    changes = []
    for strength in perturbations.STRENGTHS:
        hard = perturbations.perturbed(images, name, strength)
        pixels = pixels_of(hard)
        assert hard.shape == images.shape
        assert pixels.min() >= -1e-6
        assert pixels.max() <= 1 + 1e-6
        assert torch.equal(hard, perturbations.perturbed(images, name, strength))
        changes.append(float((hard - images).norm()))
    assert torch.equal(images, before)
    assert 0 < changes[0] < changes[1] < changes[2]


def test_images_are_moved_by_whole_pixels(images: Tensor) -> None:
    pixels = pixels_of(images).view(-1, 28, 28)
    moved = pixels_of(perturbations.perturbed(images, "moved", 2)).view(-1, 28, 28)
    for one, other in zip(pixels, moved, strict=True):
        shifts = [torch.roll(one, (a, b), (0, 1)) for a in (-2, 2) for b in (-2, 2)]
        assert min(float((other - shift).abs().max()) for shift in shifts) < 1e-5


def test_rotation_keeps_the_middle(images: Tensor) -> None:
    turned = pixels_of(perturbations.perturbed(images, "rotated", 1)).view(-1, 28, 28)
    assert (turned[:, 13:15, 13:15] - 1).abs().max() < 1e-5
    assert turned.sum() == pytest.approx(float(pixels_of(images).sum()), rel=0.02)


@pytest.mark.parametrize("steps", [1, 10])
def test_attack_raises_the_loss_within_its_size(images: Tensor, steps: int) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 10)).eval()
    labels = torch.arange(8)
    hard = perturbations.attacked(model, images, labels, 0.05, steps)
    change = (pixels_of(hard) - pixels_of(images)).abs().max()
    assert change <= 0.05 + 1e-5
    assert change > 0.04
    losses = [float(F.cross_entropy(model(x), labels).detach()) for x in (images, hard)]
    assert losses[1] > losses[0] + 0.01
    assert all(parameter.grad is None for parameter in model.parameters())


def test_more_steps_attack_better(images: Tensor) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(784, 64), nn.Tanh(), nn.Linear(64, 10)).eval()
    labels = torch.zeros(8, dtype=torch.long)
    one, many = (
        F.cross_entropy(
            model(perturbations.attacked(model, images, labels, 0.2, steps)), labels
        ).detach()
        for steps in (1, 20)
    )
    # By more than rounding, or the further steps may do nothing.
    assert many > one + 0.05


def small_problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    return model, torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 3, (20,))


def test_gradient_norm_is_that_of_autograd() -> None:
    model, x, y = small_problem()
    found = measures.gradient_norm(model, x, y)
    assert all(parameter.grad is None for parameter in model.parameters())
    F.cross_entropy(model(x), y).backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert found == pytest.approx(float(grads.norm()), rel=1e-12)


def test_frozen_parameters_have_no_part() -> None:
    model, x, y = small_problem()
    all_of_it = measures.gradient_norm(model, x, y)
    model[0].weight.requires_grad_(False)
    assert measures.gradient_norm(model, x, y) < all_of_it


def test_hessian_is_that_of_autograd() -> None:
    model, x, y = small_problem()
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    sizes = [p.numel() for p in model.parameters()]

    def loss(flat: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        named = dict(zip(names, parts, strict=True))
        return F.cross_entropy(torch.func.functional_call(model, named, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    exact = torch.autograd.functional.hessian(loss, flat)
    values = torch.linalg.eigvalsh(exact)
    top, trace = measures.hessian(model, x, y, 0, iterations=300, probes=2000)
    assert top == pytest.approx(float(values[values.abs().argmax()]), rel=1e-3)
    assert trace == pytest.approx(float(exact.trace()), rel=0.05)


def test_curvature_is_drawn_where_it_is_negative() -> None:
    scales = {panel.y: panel.y_scale for panel in gradient_norm.MLP.panels}
    assert (scales["eigenvalue"], scales["trace"]) == ("symlog", "symlog")


@pytest.mark.parametrize("percent", [0, 20, 60])
def test_part_of_the_labels_is_wrong(percent: int) -> None:
    labels = torch.arange(10).repeat(1000)
    noisy = label_noise.corrupted(labels, percent, 0)
    assert float((noisy != labels).float().mean()) == pytest.approx(percent / 100, abs=0.02)
    assert torch.equal(noisy, label_noise.corrupted(labels, percent, 0))
    if percent:
        assert not torch.equal(noisy, label_noise.corrupted(labels, percent, 1))
        wrong = torch.bincount(noisy[(labels == 3) & (noisy != 3)], minlength=10)
        assert wrong[3] == 0
        assert wrong[wrong > 0].numel() == 9


def test_value_at_equal_accuracy_is_between_its_neighbours() -> None:
    points = [(80.0, 70.0), (90.0, 60.0), (88.0, 50.0)]
    assert study_tables._interpolated(points, 85.0) == pytest.approx(65.0)
    assert study_tables._interpolated(points, 95.0) is None
    assert study_tables._interpolated(points, 79.0) is None


@pytest.mark.parametrize("model", ["mlp", "resnet"])
def test_looking_at_the_gradient_does_not_change_what_is_learned(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer must not take the passes of the study for its own."""
    ends, rates = [], []
    original = training.train

    def kept(*arguments: Any, **options: Any) -> training.Trained:
        found = original(*arguments, **options)
        ends.append([p.detach().clone() for p in found.model.parameters()])
        rates.append(found.record.step_loss)
        return found

    monkeypatch.setattr(gradient_norm, "train", kept)
    options = Options(is_quick=True)
    config = gradient_norm._config(model, options)
    gradient_norm._run("ring", model, options, 0)
    data = training.data_of(config, None, is_quick=True)
    kept("ring", config, 0, data)
    assert rates[0] == rates[1]
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)

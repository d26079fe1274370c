# SPDX-License-Identifier: Apache-2.0
"""The models of the tasks: shapes, sizes, layers, what they may see, and that they train."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from grng.compare.config import CompareConfig
from grng.compare.errors import UsageError
from grng.tasks import TASKS, ModelOptions
from grng.tasks.resnet import ResNet
from grng.tasks.transformer import Attention, Block
from grng.tasks.vit import VisionTransformer

# What an optimizer of Kronecker factors knows, and what is left to AdamW; no fused attention.
PLAIN = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, nn.Embedding)


def build(task: str, name: str) -> nn.Module:
    torch.manual_seed(0)
    model = TASKS[task].models[name]
    return model.build(ModelOptions() if model.option is None else ModelOptions(hidden=(16,)))


@pytest.mark.parametrize(
    ("name", "fewest", "most"),
    [("mlp", 12_000, 13_000), ("resnet", 70e3, 80e3), ("vit", 130e3, 160e3)],
)
def test_image_models_take_flat_pixels_and_train(name: str, fewest: int, most: int) -> None:
    model = build("fashion-mnist", name)
    assert fewest < sum(parameter.numel() for parameter in model.parameters()) < most
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(16, 784, generator=generator)
    labels = torch.randint(0, 10, (16,), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        logits = model(inputs)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert (logits.shape, logits.dtype) == ((16, 10), torch.float32)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("task", "name"), [("fashion-mnist", "resnet"), ("fashion-mnist", "vit")])
def test_parameters_belong_to_plain_layers(task: str, name: str) -> None:
    model = build(task, name)
    in_layers = {
        id(p) for layer in model.modules() if isinstance(layer, PLAIN) for p in layer.parameters()
    }
    others = {name for name, p in model.named_parameters() if id(p) not in in_layers}
    assert others <= {"positions"}
    assert all(layer.bias is None for layer in model.modules() if isinstance(layer, nn.Conv2d))


@pytest.mark.parametrize("name", ["mlp", "resnet", "vit"])
def test_evaluation_of_a_sample_does_not_depend_on_the_others(name: str) -> None:
    model = build("fashion-mnist", name).eval()
    inputs = torch.randn(4, 784, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(inputs)[1:2], model(inputs[1:2]), rtol=1e-4, atol=1e-5)


def test_resnet_halves_the_image_twice() -> None:
    model = ResNet(side=28, widths=(4, 8, 16), classes=3)
    shapes = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    assert model(torch.zeros(2, 784)).shape == (2, 3)
    assert shapes == [(4, 28, 28), (8, 14, 14), (16, 7, 7)]


def test_vit_patches_are_squares_of_the_image() -> None:
    model = VisionTransformer(8, patch=4, width=8, depth=1, heads=2, mlp_ratio=2, classes=3)
    image = torch.arange(64.0).reshape(8, 8)
    (patches,) = model.split(image.reshape(1, 64))
    torch.testing.assert_close(patches[1], image[:4, 4:].flatten(), rtol=0, atol=0)
    torch.testing.assert_close(patches[2], image[4:, :4].flatten(), rtol=0, atol=0)


def test_attention_is_softmax_attention() -> None:
    """Against the same formula of torch's module, given the same weights."""
    torch.manual_seed(0)
    ours = Attention(12, heads=3, is_causal=False)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
        }
    )
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


def test_causal_block_does_not_see_what_comes_later() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 6, 8)
    changed = x.clone()
    changed[:, 4:] *= -1
    for is_causal in (True, False):
        block = Block(8, heads=2, mlp_ratio=2, is_causal=is_causal)
        before, after = block(x)[:, :4], block(changed)[:, :4]
        assert torch.allclose(before, after) == is_causal


def config(**options: str | tuple[int, ...] | int | None) -> CompareConfig:
    common = {"task": "fashion-mnist", "epochs": 1, "seeds": (0,), "batch_size": 8, "hidden": None}
    common |= {"device": "cpu", "threads": None, "warmup_fraction": 0.0, "train_limit": None}
    return CompareConfig(**{**common, **options})  # type: ignore[arg-type]


def test_model_is_the_first_of_the_task_unless_given() -> None:
    assert (config().model_name, config().model_options.hidden) == ("mlp", (256, 256))
    assert config(model="vit").model_name == "vit"
    assert config(task="plays").model_name == "minilm"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": "bert"},
            "--model of task 'fashion-mnist' must be one of mlp, resnet, vit, got 'b",
        ),
        (
            {"task": "digits", "model": "vit"},
            "--model of task 'digits' must be one of mlp, got 'vit'",
        ),
        (
            {"model": "vit", "hidden": (4,)},
            "--hidden does not apply to model 'vit' of task 'fashion-mnist', which has no such option",
        ),
        ({"lora_rank": 4}, "--lora-rank does not apply to model 'mlp' of .*, which has --hidden"),
        (
            {"task": "authors", "model": "minilm-full", "lora_rank": 4},
            "--lora-rank does not apply to model 'minilm-full' of .*, which has no such option",
        ),
    ],
)
def test_wrong_model_options_are_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(**options)

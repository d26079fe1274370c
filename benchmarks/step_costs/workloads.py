# SPDX-License-Identifier: Apache-2.0
"""The models whose training step is measured, with random weights and data: times do not depend on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grng.tasks.encoder import SentenceClassifier
from grng.tasks.resnet import BasicBlock
from grng.tasks.vit import VisionTransformer

# MiniLM's vocabulary, and where MiniLM has its LoRA matrices.
VOCABULARY, LORA_TARGETS = 30522, ["query", "value"]


@dataclass(frozen=True)
class Workload:
    """A classifier and a batch for it.

    Attributes:
        title: For plots: the model and the shape of the batch.
        build: Makes the model; draws from torch's global generator.
        draw: Makes the inputs from a generator.
        batch: Examples.
        classes: Of the labels.
        autocast: Whether the model computes in bf16.
    """

    title: str
    build: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], Tensor]
    batch: int
    classes: int
    autocast: bool = False

    def make(self, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
        """Return the model, its inputs and labels; the same at every call."""
        torch.manual_seed(0)
        model = self.build()
        generator = torch.Generator().manual_seed(1)
        x = self.draw(generator)
        y = torch.randint(self.classes, (self.batch,), generator=generator)
        return model.to(device), x.to(device), y.to(device)


def _normal(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.empty(shape).normal_(generator=generator)


def _tokens(*shape: int) -> Callable[[torch.Generator], Tensor]:
    # 0 is padding.
    return lambda generator: torch.randint(1, VOCABULARY, shape, generator=generator)


def mlp(*sizes: int) -> nn.Module:
    """Return linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def minilm_lora(rank: int, classes: int) -> nn.Module:
    """Return an encoder of MiniLM's size with LoRA on query and value, and a head."""
    import peft
    from transformers import BertConfig, BertModel

    config: Any = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    encoder: nn.Module = BertModel(config, add_pooling_layer=False).requires_grad_(False)
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, bias="none")
    encoder = peft.inject_adapter_in_model(lora, encoder)
    for name, p in encoder.named_parameters():
        if "lora_B" in name:
            # At its start, zero, A has no gradient: its part of a step would be of zeros.
            nn.init.normal_(p, std=0.02)
    return SentenceClassifier(encoder, 384, classes)


def resnet18(classes: int) -> nn.Module:
    """Return the convolutions of ResNet-18, with a stem for small images (no pooling after it)."""
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [
        BasicBlock(before, after, stride=1 if before == after else 2)
        for before, after in itertools.pairwise(widths)
    ]
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, classes),
    )


class LoraLinear(nn.Module):
    """A frozen linear layer and the product of two narrow ones (Hu et al. 2022)."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        """Args: frozen: keeps its weights; rank: of what is added."""
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.a = nn.Linear(frozen.in_features, rank, bias=False)
        # Not zero as at the start of training: A would have no gradient.
        self.b = nn.Linear(rank, frozen.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        whole: Tensor = self.frozen(x) + 2.0 * self.b(self.a(x))
        return whole


def vit_lora(width: int, depth: int, heads: int, rank: int, classes: int) -> nn.Module:
    """Return a vision transformer for 224 x 224 with LoRA in its attention and a head; the rest is frozen."""
    model = VisionTransformer(224, 16, width, depth, heads, 4, classes).requires_grad_(False)
    for block in model.blocks:
        attention: Any = block.attention
        attention.qkv = LoraLinear(attention.qkv, rank)
        attention.proj = LoraLinear(attention.proj, rank)
    model.head.requires_grad_(True)
    return model


WORKLOADS = {
    "mlp": Workload(
        "MLP 784-256-256-10, batch 256", lambda: mlp(784, 256, 256, 10), _normal(256, 784), 256, 10
    ),
    "minilm-lora": Workload(
        "MiniLM + LoRA r 8, batch 16 x 64 tokens",
        lambda: minilm_lora(8, 10),
        _tokens(16, 64),
        16,
        10,
    ),
    "vit-s": Workload(
        "ViT-S, batch 32 x 196 patches",
        lambda: VisionTransformer(224, 16, 384, 12, 6, 4, 1000),
        _normal(32, 224 * 224),
        32,
        1000,
    ),
    "resnet-18": Workload(
        "ResNet-18, batch 32 of 3 x 64 x 64",
        lambda: resnet18(200),
        _normal(32, 3, 64, 64),
        32,
        200,
    ),
    "vit-b-lora": Workload(
        "ViT-B/16 + LoRA r 16, batch 64 x 196 patches, bf16",
        lambda: vit_lora(768, 12, 12, 16, 100),
        _normal(64, 224 * 224),
        64,
        100,
        autocast=True,
    ),
}
# What a CPU does in minutes.
SMALL = ("mlp", "minilm-lora", "vit-s", "resnet-18")
SLOW = ("vit-s", "resnet-18")

# SPDX-License-Identifier: Apache-2.0
"""Named shapes, each with where its numbers come from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Factor(NamedTuple):
    """One Kronecker factor: its order, and whether its last row is that of the bias."""

    n: int
    bias: bool = False


@dataclass(frozen=True)
class ModelShapes:
    """All factors and weights of one model, as a step meets them.

    Attributes:
        name: As on the command line.
        source: Where the numbers come from.
        rows: Samples (tokens, patches) of one step.
        factors: Input and output factor of every layer; readers of one tensor share the input's.
        weights: Gradient shapes (d_out, d_in), the bias as a last column.
        inputs: For each weight the place of its input's factor in ``factors``; weights with the same
            number read the same tensor, so they share the factor and its inverse.
    """

    name: str
    source: str
    rows: int
    factors: tuple[Factor, ...]
    weights: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Convolution:
    """One 2-d convolution with a square image and a square kernel.

    Attributes:
        name: As in the tables.
        batch: Images.
        channels: Of the input.
        size: Height and width of the input.
        kernel: Height and width of the kernel.
        stride: In both directions.
        padding: On all sides.
        count: How many convolutions of the model meet an input of these numbers.
    """

    name: str
    batch: int
    channels: int
    size: int
    kernel: int
    stride: int = 1
    padding: int = 0
    count: int = 1

    @property
    def places(self) -> int:
        """Positions of the output."""
        return ((self.size + 2 * self.padding - self.kernel) // self.stride + 1) ** 2

    @property
    def rows(self) -> int:
        """Patches of one batch."""
        return self.batch * self.places

    @property
    def order(self) -> int:
        """Order of the factor."""
        return self.channels * self.kernel**2


@dataclass(frozen=True)
class ConvolutionSet:
    """Convolutions of one model.

    Attributes:
        name: As on the command line.
        source: Where the numbers come from.
        convolutions: Each shape once.
    """

    name: str
    source: str
    convolutions: tuple[Convolution, ...]


def _mlp(name: str, source: str, sizes: Sequence[int], rows: int) -> ModelShapes:
    inputs = tuple(Factor(n + 1, bias=True) for n in sizes[:-1])
    outputs = tuple(Factor(n) for n in sizes[1:])
    weights = tuple((b, a + 1) for a, b in itertools.pairwise(sizes))
    return ModelShapes(name, source, rows, inputs + outputs, weights, tuple(range(len(weights))))


def _lora(name: str, source: str, *, layers: int, hidden: int, rank: int, rows: int) -> ModelShapes:
    """LoRA on the query and value projections: A is [rank, hidden], B [hidden, rank].

    Per layer: one input factor that both A share, two output factors of B, all of order hidden;
    and for each of q and v the output factor of A and the input factor of B, of order rank.
    """
    factors = (Factor(hidden),) * (3 * layers) + (Factor(rank),) * (4 * layers)
    weights = ((rank, hidden), (hidden, rank)) * (2 * layers)
    inputs: list[int] = []
    for layer in range(layers):
        shared, inner = 3 * layer, 3 * layers + 4 * layer
        # A and B of the query, then A and B of the value.
        inputs += (shared, inner + 1, shared, inner + 3)
    return ModelShapes(name, source, rows, factors, weights, tuple(inputs))


MODELS = {
    shapes.name: shapes
    for shapes in (
        _mlp(
            "mlp-fashion",
            "Fashion-MNIST 28 x 28, two hidden layers, batch 256",
            (784, 256, 256, 10),
            256,
        ),
        _lora(
            "minilm-lora",
            "all-MiniLM-L6: 6 layers of 384; LoRA q,v of rank 8; 16 sentences of 128 tokens",
            layers=6,
            hidden=384,
            rank=8,
            rows=16 * 128,
        ),
        _lora(
            "vit-b16-lora-r16",
            "ViT-B/16: 12 layers of 768, 197 patches; LoRA q,v of rank 16; batch 64",
            layers=12,
            hidden=768,
            rank=16,
            rows=64 * 197,
        ),
        _lora(
            "roberta-lora-r8",
            "RoBERTa-base: 12 layers of 768; LoRA q,v of rank 8; 16 texts of 512 tokens",
            layers=12,
            hidden=768,
            rank=8,
            rows=16 * 512,
        ),
        _lora(
            "llama-7b-lora-r16",
            "LLaMA-7B: 32 layers of 4096; LoRA q,v of rank 16; one text of 2048 tokens; 6.4 GB of "
            "fp32 factors and as much of inverses: on a CPU only by name",
            layers=32,
            hidden=4096,
            rank=16,
            rows=2048,
        ),
    )
}

CONVOLUTIONS = {
    shapes.name: shapes
    for shapes in (
        ConvolutionSet(
            "resnet50-convs",
            "ResNet-50 on 224 x 224 (the stride in the 3 x 3, as torchvision has it), batch 16: the "
            "stem, the 3 x 3 of stride 1 of each stage, and two inputs of 1 x 1",
            (
                Convolution("stem 7x7/2 224x224x3", 16, 3, 224, 7, stride=2, padding=3),
                Convolution("3x3 56x56x64", 16, 64, 56, 3, padding=1, count=3),
                Convolution("3x3 28x28x128", 16, 128, 28, 3, padding=1, count=3),
                Convolution("3x3 14x14x256", 16, 256, 14, 3, padding=1, count=5),
                Convolution("3x3 7x7x512", 16, 512, 7, 3, padding=1, count=2),
                Convolution("1x1 28x28x512", 16, 512, 28, 1, count=4),
                Convolution("1x1 14x14x1024", 16, 1024, 14, 1, count=6),
            ),
        ),
    )
}

# Factor orders from small layers to the MLP of a base-size transformer; a small and a usual batch.
FACTOR_SIZES = (64, 128, 256, 512, 768, 1024, 2048, 3072)
FACTOR_ROWS = (2048, 8192)

# Equal matrices in one call: from many small to a few of transformer size.
INVERSE_BATCHES = ((96, 16), (96, 32), (64, 64), (64, 128), (16, 256), (12, 768))

# (outputs, parameters): binary and ten-class problems on small nets and on LoRA, and a wide output.
KALMAN_SIZES = ((2, 300_000), (10, 300_000), (10, 3_000_000), (100, 300_000))

# Gradient shapes: LoRA of base and 7B transformers; attention and both MLP weights of a base one.
WEIGHTS = ((768, 16), (768, 768), (768, 3072), (3072, 768), (4096, 16))

# Parameters: a small policy net to a large one.
VECTOR_SIZES = (10_000, 100_000, 1_000_000, 10_000_000)


def _known(wanted: Sequence[str] | None, default: Sequence[str]) -> list[str]:
    names = list(default) if wanted is None else [name for name in wanted if name != "none"]
    known = [*MODELS, *CONVOLUTIONS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"shapes must be of {', '.join(known)}, got {', '.join(unknown)}")
    return names


def chosen_models(wanted: Sequence[str] | None, default: Sequence[str]) -> list[ModelShapes]:
    """Return model shapes by name; names of convolutions are passed over.

    Args:
        wanted: Names from the command line; ``none`` for none of them; None for the default.
        default: Names of the benchmark.

    Raises:
        ValueError: A name is not known.
    """
    return [MODELS[name] for name in _known(wanted, default) if name in MODELS]


def chosen_convolutions(
    wanted: Sequence[str] | None, default: Sequence[str]
) -> list[ConvolutionSet]:
    """Return sets of convolutions by name; names of other models are passed over.

    Args:
        wanted: Names from the command line; ``none`` for none of them; None for the default.
        default: Names of the benchmark.

    Raises:
        ValueError: A name is not known.
    """
    return [CONVOLUTIONS[name] for name in _known(wanted, default) if name in CONVOLUTIONS]

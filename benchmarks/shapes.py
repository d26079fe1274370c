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
    """

    name: str
    source: str
    rows: int
    factors: tuple[Factor, ...]
    weights: tuple[tuple[int, int], ...]


def _mlp(name: str, source: str, sizes: Sequence[int], rows: int) -> ModelShapes:
    inputs = tuple(Factor(n + 1, bias=True) for n in sizes[:-1])
    outputs = tuple(Factor(n) for n in sizes[1:])
    weights = tuple((b, a + 1) for a, b in itertools.pairwise(sizes))
    return ModelShapes(name, source, rows, inputs + outputs, weights)


def _lora(name: str, source: str, *, layers: int, hidden: int, rank: int, rows: int) -> ModelShapes:
    """LoRA on the query and value projections: A is [rank, hidden], B [hidden, rank].

    Per layer: one input factor that both A share, two output factors of B, all of order hidden;
    and for each of q and v the output factor of A and the input factor of B, of order rank.
    """
    factors = (Factor(hidden),) * (3 * layers) + (Factor(rank),) * (4 * layers)
    weights = ((rank, hidden), (hidden, rank)) * (2 * layers)
    return ModelShapes(name, source, rows, factors, weights)


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
    )
}

# Factor orders from small layers to the MLP of a base-size transformer; a small and a usual batch.
FACTOR_SIZES = (64, 128, 256, 512, 768, 1024, 2048, 3072)
FACTOR_ROWS = (2048, 8192)

# Equal matrices in one call: from many small to a few of transformer size.
INVERSE_BATCHES = ((64, 64), (16, 256), (12, 768))

# (outputs, parameters): binary and ten-class problems on small nets and on LoRA, and a wide output.
KALMAN_SIZES = ((2, 300_000), (10, 300_000), (10, 3_000_000), (100, 300_000))

# Gradient shapes: LoRA and full weights of base and 7B transformers.
WEIGHTS = ((768, 16), (768, 768), (768, 3072), (4096, 16))

# Parameters: a small policy net to a large one.
VECTOR_SIZES = (10_000, 100_000, 1_000_000, 10_000_000)


def chosen_models(wanted: Sequence[str] | None, default: Sequence[str]) -> list[ModelShapes]:
    """Return model shapes by name.

    Args:
        wanted: Names from the command line; ``none`` for none of them; None for the default.
        default: Names of the benchmark.

    Raises:
        ValueError: A name is not known.
    """
    names = list(default) if wanted is None else [name for name in wanted if name != "none"]
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise ValueError(f"shapes must be of {', '.join(MODELS)}, got {', '.join(unknown)}")
    return [MODELS[name] for name in names]

# SPDX-License-Identifier: Apache-2.0
"""Splits that depend on the data alone: the same on every machine and with every library version."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from grng.tasks.data import DataError, LoadRequest


def hashed_order(keys: Sequence[str]) -> list[int]:
    """Indices in the order of the keys' SHA-256: as good as random, and never another.

    Args:
        keys: One per sample. Equal keys keep their order.

    Returns:
        A permutation of ``range(len(keys))``.
    """
    return sorted(range(len(keys)), key=lambda index: hashlib.sha256(keys[index].encode()).digest())


def divide_training(samples: int, request: LoadRequest) -> tuple[slice, slice | None]:
    """Which training samples are trained on and which are held out.

    Args:
        samples: Training samples in all, in an order without meaning or in that of a text.
        request: ``validation`` are taken from the end; ``train_limit`` counts from the start.

    Returns:
        ``(training, validation)`` as slices, the second None for no validation samples.

    Raises:
        DataError: No training sample would be left.
    """
    kept = samples - request.validation
    if kept < 1:
        raise DataError(
            f"--validation must leave training samples: at most {samples - 1}, "
            f"got {request.validation}"
        )
    held_out = slice(kept, samples) if request.validation else None
    limit = kept if request.train_limit is None else min(kept, request.train_limit)
    return slice(0, limit), held_out

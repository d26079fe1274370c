# SPDX-License-Identifier: Apache-2.0
"""The idx format of the MNIST family: magic number, big-endian sizes, then unsigned bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from grng.tasks.data import DataError

_UNSIGNED_BYTE = 0x08


def parse_idx(content: bytes, *, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Array of unsigned bytes held by an idx file.

    Args:
        content: The whole file, decompressed.
        name: File name for error messages.
        shape: The shape that the file must have.

    Returns:
        A read-only array of ``shape`` that shares memory with ``content``.

    Raises:
        DataError: The magic number, the shape or the length is not the expected one.
    """
    rank = len(shape)
    header_bytes = 4 + 4 * rank
    if len(content) < header_bytes:
        raise DataError(
            f"{name}: an idx header of {header_bytes} bytes was expected, "
            f"got {len(content)} bytes in all"
        )
    expected_magic = bytes((0, 0, _UNSIGNED_BYTE, rank))
    if content[:4] != expected_magic:
        raise DataError(
            f"{name}: idx magic must be 0x{expected_magic.hex()} "
            f"(unsigned bytes, {rank} dimensions), got 0x{content[:4].hex()}"
        )
    sizes = np.frombuffer(content, dtype=">u4", count=rank, offset=4)
    found_shape = tuple(int(size) for size in sizes)
    if found_shape != shape:
        raise DataError(f"{name}: shape must be {list(shape)}, got {list(found_shape)}")
    expected_bytes = header_bytes + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected_bytes:
        raise DataError(f"{name}: must hold {expected_bytes} bytes, got {len(content)}")
    return np.frombuffer(content, dtype=np.uint8, offset=header_bytes).reshape(shape)

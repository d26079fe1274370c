# SPDX-License-Identifier: Apache-2.0
"""Images of one size in a file of bytes that is mapped into memory, with labels and checksum beside it."""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grng.tasks.atomic import replacing
from grng.tasks.data import DataError
from grng.tasks.parquet import read_rows
from grng.tasks.splits import hashed_order

# To be raised whenever the preparation gives something else.
_PREPARATION = 1
# Images that are decoded at a time, by as many threads as there are processors.
_CHUNK = 256
_REPORT_EVERY = 10_000
_HASH_ROWS = 1024

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Images:
    """One part of a data set in parquet files, and what is to be made of it."""

    name: str
    files: list[Path]
    rows: int
    # Names of columns.
    image: str
    label: str
    classes: int
    side: int
    # Whether to put the samples in the order of a hash: those of Food-101 come class by class.
    is_shuffled: bool

    def recipe(self) -> str:
        """What the result depends on besides the files."""
        return str((_PREPARATION, self.name, self.image, self.label, self.side, self.is_shuffled))


@dataclass(frozen=True)
class ImageFile:
    """Images ``[n, 3, side, side]`` in a mapped file, labels ``[n]``, and the checksum of both."""

    images: Pixels
    labels: npt.NDArray[np.int64]
    sha256: str


def decode(content: bytes, side: int) -> Pixels:
    """An image file as pixels: the shorter side resized to ``side``, the middle of the longer one.

    Args:
        content: Of a file that pillow can read.
        side: Pixels of each side.

    Returns:
        ``[3, side, side]``, red, green, blue.
    """
    from PIL import Image

    with Image.open(io.BytesIO(content)) as opened:
        image = opened.convert("RGB")
    if image.size != (side, side):
        scale = side / min(image.size)
        width, height = (max(side, round(scale * length)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)


def _samples(source: Images) -> Iterator[tuple[Pixels, int]]:
    """Images and labels in the order of the files.

    Raises:
        DataError: A row has no image that can be read, or no class.
    """

    def read(found: tuple[Path, dict[str, Any]]) -> tuple[Pixels, int]:
        path, row = found
        image, label = row[source.image], row[source.label]
        if not isinstance(label, int) or not 0 <= label < source.classes:
            raise DataError(
                f"{path}: column {source.label!r} must have 0..{source.classes - 1}, got {label!r}"
            )
        content = image.get("bytes") if isinstance(image, dict) else None
        if not isinstance(content, bytes):
            raise DataError(
                f"{path}: column {source.image!r} must have images with their bytes, got "
                f"{type(image).__name__}"
            )
        try:
            return decode(content, source.side), label
        # Pillow raises OSError, ValueError, SyntaxError or struct.error for damaged files.
        except Exception as error:
            raise DataError(
                f"{path}: column {source.image!r} has an image that is damaged: {error}"
            ) from None

    rows = read_rows(source.files, (source.image, source.label))
    with ThreadPoolExecutor() as pool:
        while chunk := list(islice(rows, _CHUNK)):
            yield from pool.map(read, chunk)


def _checksum(images: Pixels, labels: npt.NDArray[np.int64]) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(images), _HASH_ROWS):
        digest.update(np.ascontiguousarray(images[start : start + _HASH_ROWS]).data)
    digest.update(labels.tobytes())
    return digest.hexdigest()


def _map(path: Path) -> Pixels:
    # Copy on write: torch warns of arrays that it could not write to.
    images: Pixels = np.load(path, mmap_mode="c", allow_pickle=False)
    return images


def _read(path: Path, source: Images) -> ImageFile | None:
    """What was kept; None if there is nothing, or nothing whole."""
    try:
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as content:
            labels, checksum = content["labels"], str(content["sha256"])
        images = _map(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    is_whole = images.shape == (source.rows, 3, source.side, source.side)
    is_whole = is_whole and _checksum(images, labels) == checksum
    return ImageFile(images, labels, checksum) if is_whole else None


def _write(path: Path, source: Images, report: Callable[[str], None]) -> None:
    """Writes the images, and last of all the labels with the checksum of both.

    Raises:
        DataError: The files have fewer rows than they say.
    """
    shape = (source.rows, 3, source.side, source.side)
    labels = np.zeros(source.rows, dtype=np.int64)
    keys = [f"{source.name} {index}" for index in range(source.rows)]
    order = hashed_order(keys) if source.is_shuffled else range(source.rows)
    places = np.argsort(np.asarray(order))
    done = 0
    with replacing(path) as partial:
        images = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        for pixels, label in _samples(source):
            images[places[done]], labels[places[done]] = pixels, label
            done += 1
            if done % _REPORT_EVERY == 0:
                report(f"{source.name}: {done:,} of {source.rows:,} images")
        if done < source.rows:
            raise DataError(f"{source.name}: {source.rows} images expected, got {done}")
        images.flush()
        checksum = _checksum(images, labels)
    with replacing(path.with_suffix(".npz")) as partial, partial.open("wb") as stream:
        np.savez(stream, labels=labels, sha256=checksum)


def read_or_prepare(path: Path, source: Images, report: Callable[[str], None]) -> ImageFile:
    """Images of a mapped file; decoded and written into it where it is not there whole.

    Args:
        path: File ``….npy`` in an existing folder; its name says what it was made of.
        source: Where the images are from.
        report: Receives a line for every 10,000 images.

    Returns:
        The images, on disk until they are used.

    Raises:
        DataError: The source is damaged, or the file cannot be written.
    """
    found = _read(path, source)
    if found is not None:
        return found
    size = source.rows * 3 * source.side**2 / 1e9
    report(
        f"{source.name}: decoding {source.rows:,} images to {source.side}x{source.side}, {size:.1f} GB"
    )
    try:
        _write(path, source, report)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None
    found = _read(path, source)
    if found is None:
        raise DataError(f"{path}: was written, but does not read back as it was; is the disk full?")
    return found

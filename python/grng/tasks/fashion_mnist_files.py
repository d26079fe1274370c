# SPDX-License-Identifier: Apache-2.0
"""The four files of Fashion-MNIST: where they are looked for, and the checksums they must have."""

from __future__ import annotations

import gzip
import hashlib
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grng.tasks import cache
from grng.tasks.atomic import replacing
from grng.tasks.data import DataError
from grng.tasks.fashion_mnist_sources import (
    PACKAGE,
    download,
    extract_debian_package,
    find_debian_package,
)

TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
TRAIN_LABELS = "train-labels-idx1-ubyte.gz"
TEST_IMAGES = "t10k-images-idx3-ubyte.gz"
TEST_LABELS = "t10k-labels-idx1-ubyte.gz"


@dataclass(frozen=True)
class ExpectedFile:
    """Shape of an idx file and the SHA-256 of its decompressed bytes."""

    shape: tuple[int, ...]
    sha256: str


# Checksums of the decompressed bytes: Debian strips the gzip headers of the original files, so the
# compressed ones differ between the two sources while the content is the same.
FILES: dict[str, ExpectedFile] = {
    TRAIN_IMAGES: ExpectedFile(
        (60000, 28, 28), "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
    ),
    TRAIN_LABELS: ExpectedFile(
        (60000,), "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
    ),
    TEST_IMAGES: ExpectedFile(
        (10000, 28, 28), "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
    ),
    TEST_LABELS: ExpectedFile(
        (10000,), "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
    ),
}


@dataclass(frozen=True)
class FoundFiles:
    """Decompressed and verified contents by file name, and which source they came from."""

    contents: dict[str, bytes]
    source: str


@dataclass(frozen=True)
class Source:
    """A place to take the files from: fills or names a folder, or raises ``DataError``."""

    name: str
    provide: Callable[[Path, tuple[str, ...]], Path]
    is_cached: bool


SOURCES: tuple[Source, ...] = (
    Source(f"installed package {PACKAGE}", find_debian_package, is_cached=False),
    Source(f"apt-get download {PACKAGE}", extract_debian_package, is_cached=True),
    Source("HTTPS download", download, is_cached=True),
)


def cache_dir() -> Path:
    """``$GRNG_DATA/fashion-mnist``, or ``~/.cache/grng/fashion-mnist``."""
    return cache.cache_dir("fashion-mnist")


def read_verified(path: Path) -> bytes:
    """Decompressed content of one of the four files.

    Args:
        path: The gzip file; its name says which checksum it must have.

    Returns:
        The decompressed bytes.

    Raises:
        DataError: The file cannot be read or its content has another checksum.
    """
    expected = FILES[path.name].sha256
    content = bytearray()
    damage = ""
    try:
        with gzip.open(path, "rb") as stream:
            while chunk := stream.read(1 << 20):
                content += chunk
    except (EOFError, OSError, zlib.error) as error:
        damage = f" ({error})"
    found = hashlib.sha256(content).hexdigest()
    if damage or found != expected:
        raise DataError(
            f"{path}: damaged: SHA-256 of the decompressed content must be {expected}, "
            f"got {found} from {len(content)} bytes{damage}"
        )
    return bytes(content)


def _read_folder(folder: Path) -> dict[str, bytes]:
    return {name: read_verified(folder / name) for name in FILES}


def _store(folder: Path, target: Path) -> None:
    """Copies verified files."""
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        with replacing(target / name) as partial:
            partial.write_bytes((folder / name).read_bytes())


def obtain(data_dir: Path | None, report: Callable[[str], None]) -> FoundFiles:
    """The four files from the first place that has them; fetched ones are kept for the next time.

    Order: ``data_dir`` or the cache folder, the installed Debian package, the Debian package
    through ``apt-get download`` (no root needed), HTTPS.

    Args:
        data_dir: Folder that holds the files or will hold them; the cache folder if ``None``.
        report: Receives one line per attempt that takes time.

    Returns:
        The verified contents.

    Raises:
        DataError: A file in the folder is damaged, or no place has the files.
    """
    folder = data_dir.expanduser() if data_dir is not None else cache_dir()
    missing = [name for name in FILES if not (folder / name).is_file()]
    if not missing:
        try:
            return FoundFiles(_read_folder(folder), "--data-dir" if data_dir else "cache folder")
        except DataError as error:
            raise DataError(f"{error}; delete the file to have it fetched again") from None

    failures = [f"{folder}: lacks {', '.join(missing)}"]
    for source in SOURCES:
        with tempfile.TemporaryDirectory(prefix="grng-fashion-mnist-") as scratch:
            try:
                if source.is_cached:
                    report(f"Fashion-MNIST is not in {folder}; trying {source.name}")
                provided = source.provide(Path(scratch), tuple(FILES))
                contents = _read_folder(provided)
            except DataError as error:
                failures.append(f"{source.name}: {error}")
                continue
            if source.is_cached:
                try:
                    _store(provided, folder)
                except OSError as error:
                    report(f"Fashion-MNIST could not be kept in {folder}: {error.strerror}")
            return FoundFiles(contents, source.name)
    raise DataError(
        f"Fashion-MNIST not found. Either `apt-get install {PACKAGE}`, or put "
        f"{', '.join(FILES)} into a folder and pass it as --data-dir. Tried: " + "; ".join(failures)
    )

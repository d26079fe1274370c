# SPDX-License-Identifier: Apache-2.0
"""Places that Fashion-MNIST is taken from; each returns a folder with the files or says why not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from grng.tasks.data import DataError
from grng.tasks.fetch import read_url, run_command

PACKAGE = "dataset-fashion-mnist"
_PACKAGE_DIR = Path("usr/share/datasets/fashion-mnist")
_APT_LISTS = Path("/var/lib/apt/lists")
_URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
# The largest of the four files has 26 MB; more than this is not what was asked for.
_DOWNLOAD_LIMIT_BYTES = 64 << 20


def _with_all(folder: Path, names: tuple[str, ...]) -> Path:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"no {', '.join(missing)} there")
    return folder


def find_debian_package(scratch: Path, names: tuple[str, ...]) -> Path:
    """Folder of the installed Debian package.

    Args:
        scratch: Not used.
        names: The files that must be there.

    Returns:
        The package's folder.

    Raises:
        DataError: The package is not installed or not whole.
    """
    del scratch
    folder = Path("/") / _PACKAGE_DIR
    if not folder.is_dir():
        raise DataError("not installed")
    return _with_all(folder, names)


def extract_debian_package(scratch: Path, names: tuple[str, ...]) -> Path:
    """Fetches the Debian package and unpacks it into ``scratch`` without installing it.

    Args:
        scratch: An empty folder.
        names: The files that the package must hold.

    Returns:
        The folder of the unpacked files.

    Raises:
        DataError: This system has no apt, or it cannot fetch or unpack the package.
    """
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise DataError(f"this system has no {tool}")
    has_lists = any(_APT_LISTS.glob("*_Packages*"))
    if not has_lists and os.geteuid() == 0:
        run_command(["apt-get", "update", "-qq"], scratch)
    run_command(["apt-get", "download", "-qq", PACKAGE], scratch)
    archives = sorted(scratch.glob("*.deb"))
    if not archives:
        raise DataError("apt-get download left no .deb file")
    run_command(["dpkg", "-x", archives[0].name, "unpacked"], scratch)
    return _with_all(scratch / "unpacked" / _PACKAGE_DIR, names)


def download(scratch: Path, names: tuple[str, ...]) -> Path:
    """Downloads the files from the data set's own repository into ``scratch``.

    Args:
        scratch: An empty folder.
        names: The files to download.

    Returns:
        ``scratch``.

    Raises:
        DataError: A file could not be downloaded.
    """
    for name in names:
        content = read_url(_URL + name, _DOWNLOAD_LIMIT_BYTES)
        (scratch / name).write_bytes(content)
    return scratch

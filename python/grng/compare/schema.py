# SPDX-License-Identifier: Apache-2.0
"""The head that all result files have, and how they are read and written: whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grng.compare.errors import UsageError
from grng.tasks.atomic import replacing


@dataclass(frozen=True)
class Schema:
    """A kind of result.

    Attributes:
        name: As the file has it, for example ``"grng-study"``.
        version: Of its keys; no other one is read.
        file_name: In the folder of a result.
    """

    name: str
    version: int
    file_name: str

    def file(self, path: Path) -> Path:
        """The file, given that or the folder that should hold it."""
        return path / self.file_name if path.is_dir() else path

    def is_head_of(self, content: Any) -> bool:
        """Whether this is what a file of this kind holds."""
        if not isinstance(content, dict):
            return False
        return (content.get("schema"), content.get("schema_version")) == (self.name, self.version)

    @contextmanager
    def reading(self, file: Path) -> Iterator[dict[str, Any]]:
        """The content of a file; a key or type that the block does not find in it is named with the file.

        Args:
            file: To be read.

        Yields:
            What it holds.

        Raises:
            UsageError: There is none, it is no JSON, of another kind or version, or incomplete.
        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{file}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{file}: not JSON: {error}") from error
        if not self.is_head_of(content):
            raise UsageError(f"{file}: must be a {self.name} result of version {self.version}")
        try:
            yield content
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{file}: incomplete result: {error}") from error

    def write(self, folder: Path, content: dict[str, Any]) -> Path:
        """Write a result; a reader sees the old file or the new one, never a part.

        Args:
            folder: An existing one.
            content: What comes after the head, of finite numbers.

        Returns:
            The path of the file.

        Raises:
            ValueError: A number is not finite, which JSON has no word for.
        """
        head = {"schema": self.name, "schema_version": self.version}
        text = join_number_lists(json.dumps({**head, **content}, indent=1, allow_nan=False))
        file = folder / self.file_name
        with replacing(file) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
        return file


def join_number_lists(text: str) -> str:
    """Return indented JSON with each list of numbers on one line: it reads better, and takes a quarter."""
    lines: list[str] = []
    for line in text.split("\n"):
        stripped = line.strip()
        is_number = stripped[:1].isdigit() or (stripped[:1] == "-" and stripped[1:2].isdigit())
        if is_number and lines:
            separator = "" if lines[-1].endswith("[") else " "
            lines[-1] += separator + stripped
        elif stripped in ("]", "],") and lines and lines[-1][-1:].isdigit():
            lines[-1] += stripped
        else:
            lines.append(line)
    return "\n".join(lines)

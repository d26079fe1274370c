# SPDX-License-Identifier: Apache-2.0
"""Commands and downloads that fetch data; every failure is a ``DataError`` of one line."""

from __future__ import annotations

import http.client
import subprocess
import urllib.request
from pathlib import Path

from grng.tasks.data import DataError

_COMMAND_TIMEOUT_S = 300
_DOWNLOAD_TIMEOUT_S = 30


def run_command(command: list[str], folder: Path) -> None:
    """Runs a command to its end.

    Args:
        command: Program and arguments.
        folder: Working folder.

    Raises:
        DataError: It failed or took too long; the message ends with its last line.
    """
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            timeout=_COMMAND_TIMEOUT_S,
            capture_output=True,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"{command[0]} took more than {_COMMAND_TIMEOUT_S} s") from None
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise DataError(f"`{' '.join(command)}` failed: {reason}")


def read_url(address: str, limit: int) -> bytes:
    """Downloads a file.

    Args:
        address: HTTPS address.
        limit: Most bytes that it may have.

    Returns:
        The content.

    Raises:
        DataError: It could not be downloaded or is larger than the limit.
    """
    try:
        with urllib.request.urlopen(address, timeout=_DOWNLOAD_TIMEOUT_S) as response:
            content: bytes = response.read(limit + 1)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{address}: {error}") from None
    if len(content) > limit:
        raise DataError(f"{address}: more than {limit} bytes")
    return content

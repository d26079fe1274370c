# SPDX-License-Identifier: Apache-2.0
"""What a result depends on besides its settings: versions, commit, processor."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grng

# What some of the tasks compute with.
_OPTIONAL = (
    *("scikit-learn", "transformers", "peft", "datasets", "pillow"),
    *("pytorch-optimizer", "optuna"),
    *("gymnasium", "mujoco", "box2d", "stable-baselines3", "sb3-contrib"),
)


def versions() -> dict[str, str | None]:
    """Versions of everything that computes."""
    return {
        "grng": grng.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        **{name: _installed(name) for name in _OPTIONAL},
    }


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> bytes | None:
    source = Path(__file__)
    try:
        done = subprocess.run(
            ["git", "-C", str(source.parent), *arguments],
            capture_output=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that tracks this file, and whether and what it has of changes; else None."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    # Results are written by runs: their files do not make the code that wrote them another.
    code = ("--", ":/", ":(top,exclude)benchmarks/results")
    found: dict[str, Any] = {
        "commit": commit.decode(),
        "is_dirty": bool(_git("status", "-s", *code)),
    }
    if found["is_dirty"]:
        # Of bytes: files may be in any encoding.
        changes = _git("diff", "--no-ext-diff", "--no-textconv", "--full-index", "HEAD", *code)
        digest = None if changes is None else hashlib.sha256(changes).hexdigest()[:16]
        found["diff_sha256"] = digest
    return found


def processor() -> str:
    """Model name of the CPU."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """Environment of a result.

    Args:
        device: The device of the runs.

    Returns:
        Objects fit for JSON; no path of this machine among them.
    """
    return {
        "versions": versions(),
        "git": git_state(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device.type,
        "cpu": processor(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "backend": os.environ.get("GRNG_BACKEND", "auto"),
    }

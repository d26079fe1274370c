# SPDX-License-Identifier: Apache-2.0
"""What a result depends on besides its settings: versions, commit, processor."""

from __future__ import annotations

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


def _git(*arguments: str) -> str | None:
    source = Path(__file__)
    try:
        done = subprocess.run(
            ["git", "-C", str(source.parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that tracks this file, and whether it has changes; else None."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _git("rev-parse", "HEAD")
    # Results are written by runs: their files do not make the code that wrote them another.
    changed = _git("status", "-s", "--", ":/", ":(top,exclude)benchmarks/results")
    return None if commit is None else {"commit": commit, "is_dirty": bool(changed)}


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

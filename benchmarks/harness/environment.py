# SPDX-License-Identifier: Apache-2.0
"""What a timing depends on besides the code: processor, GPU, versions, commit, threads."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import grng_kernels

ROOT = Path(__file__).resolve().parents[2]
# Those that decide which code paths of the libraries and of this package run.
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16")
GPU_QUERY = "name,driver_version,power.limit,clocks.max.sm,clocks.sm,temperature.gpu,power.draw"


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git_state() -> dict[str, Any] | None:
    """Return commit and dirtiness of the checkout, or None outside of one.

    Files of results are not counted: a run rewrites them, and the next one would call itself dirty.
    """
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--verify", "-q", "HEAD")
    if not commit:
        return None
    changed = _output(
        "git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!benchmarks/results"
    )
    return {"commit": commit, "dirty": bool(changed)}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.M)
    known = flags.group(1).split() if flags else []
    return {
        "model": model.group(1).strip() if model else platform.processor() or platform.machine(),
        "flags": [flag for flag in CPU_FLAGS if flag in known],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    state = _output("nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader", "-i", "0")
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "nvidia_smi": dict(zip(GPU_QUERY.split(","), state.split(", "), strict=False))
        if state
        else None,
    }


def describe(device: torch.device) -> dict[str, Any]:
    """Return the environment block of a result file; no path of this machine is in it."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "cpu": _cpu(),
        "gpu": _gpu(device),
        "versions": {
            "grng_kernels": grng_kernels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
        },
        "git": git_state(),
        "backends": {k: v._asdict() for k, v in grng_kernels.backends().items()},
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def slug(environment: dict[str, Any]) -> str:
    """Return the folder name of a machine: its GPU, or its CPU and number of threads."""
    if environment["gpu"]:
        name = environment["gpu"]["name"]
    else:
        name = f"{environment['cpu']['model']} {environment['cpu']['threads']} threads"
    name = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")

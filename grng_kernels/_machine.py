# SPDX-License-Identifier: Apache-2.0
"""What this machine is: the facts that a report or a benchmark has to name."""

import os
import platform
from pathlib import Path

import torch

CPU_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_bf16",
    "avx512_vnni",
    "amx_tile",
)


def cpu_model() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cpu_features() -> list[str]:
    """Return which of CPU_FEATURES this processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = {f for line in lines if line.startswith("flags") for f in line.split(":", 1)[1].split()}
    return [f for f in CPU_FEATURES if f in flags]


def gpu_names() -> list[str]:
    """Return the names of the CUDA devices."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def triton_version() -> str:
    """Return the installed version of Triton, or why there is none."""
    try:
        import triton
    except Exception as error:  # a broken Triton is a fact to report, not a failure
        return f"none ({type(error).__name__}: {error})"
    return str(triton.__version__)


def facts() -> dict[str, str]:
    """Return the machine and the versions, ready to print."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "cpu": cpu_model(),
        "cpu features": " ".join(cpu_features()) or "unknown",
        "cores, threads": f"{os.cpu_count()}, {torch.get_num_threads()}",
        "gpu": ", ".join(gpu_names()) or "none",
        "cuda (torch)": torch.version.cuda or "none",
    }

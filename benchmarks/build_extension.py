# SPDX-License-Identifier: Apache-2.0
"""Build the extension with its CUDA kernels for the running interpreter, without a network."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Older ones refuse the licence entry of pyproject.toml, which newer ones ask for.
SETUPTOOLS = 77
PIP = (
    "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check",
    "-e",
)  # fmt: skip


def setuptools_major() -> int:
    """Return the major version of setuptools, 0 where it is missing."""
    try:
        return int(version("setuptools").split(".")[0])
    except PackageNotFoundError:
        return 0


def install(environment: dict[str, str], timeout_s: float) -> str | None:
    """Install the checkout in place with pip; return why that was not possible, or None."""
    if setuptools_major() < SETUPTOOLS:
        return f"setuptools {setuptools_major()} < {SETUPTOOLS}"
    command = [sys.executable, *PIP, str(ROOT)]
    try:
        done = subprocess.run(command, env=environment, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return f"pip took more than {timeout_s:.0f} s"
    return None if done.returncode == 0 else f"pip ended with {done.returncode}"


def build_beside(environment: dict[str, str], target: Path) -> None:
    """Compile in a copy that has no pyproject.toml, so that any setuptools will do.

    Args:
        environment: Of the compiler.
        target: Folder that receives the compiled module.

    Raises:
        subprocess.CalledProcessError: The compiler failed.
        RuntimeError: It made no module, as when there is no C++ compiler.
    """
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        shutil.copy(ROOT / "setup.py", copy)
        shutil.copytree(ROOT / "csrc", copy / "csrc")
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", "out"]
        subprocess.run(command, cwd=copy, env=environment, check=True)
        modules = list((copy / "out" / "grng_kernels").glob("_C*"))
        if not modules:
            raise RuntimeError("nothing was built: no C++ compiler, or torch older than 2.10")
        target.mkdir(parents=True, exist_ok=True)
        for module in modules:
            # Renamed into place: a running process keeps the module that it has loaded.
            partial = target / f".{module.name}"
            shutil.copy(module, partial)
            partial.replace(target / module.name)


def main(argv: Sequence[str] | None = None) -> int:
    """Build; return 1 where that failed. The last line says how it was done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda", choices=("auto", "0", "1"), default="1", help="default: 1")
    parser.add_argument("--arch", help="TORCH_CUDA_ARCH_LIST, e.g. 9.0a")
    parser.add_argument("--pip-timeout-s", type=float, default=60.0)
    parser.add_argument("--no-pip", action="store_true", help="compile in place, install nothing")
    parser.add_argument("--target", type=Path, default=ROOT / "grng_kernels")
    arguments = parser.parse_args(argv)
    environment = {**os.environ, "GRNG_BUILD_CUDA": arguments.cuda}
    if arguments.arch:
        environment["TORCH_CUDA_ARCH_LIST"] = arguments.arch
    why = "not asked for" if arguments.no_pip else install(environment, arguments.pip_timeout_s)
    if why is None:
        print("installed in place with pip")
        return 0
    print(f"no pip install ({why}): compiling in place", flush=True)
    try:
        build_beside(environment, arguments.target)
    except (subprocess.CalledProcessError, RuntimeError) as error:
        print(f"build failed: {error}")
        return 1
    print(f"compiled in place ({why})")
    return 0


if __name__ == "__main__":
    sys.exit(main())

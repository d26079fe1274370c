# SPDX-License-Identifier: Apache-2.0
"""These tests run in a process of their own: see tests/ops/test_interpreter.py."""

import os

# Triton reads the variable when a kernel module is imported, so it cannot be set for some tests only.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

# SPDX-License-Identifier: Apache-2.0
"""The studies of ``benchmarks/study.py``: one file for each question."""

# SPDX-License-Identifier: Apache-2.0
"""The model behind ``predict.py``, and the kernels by operation."""

# SPDX-License-Identifier: Apache-2.0
"""Batched inversion of symmetric matrices with spectral damping."""

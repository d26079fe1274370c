# SPDX-License-Identifier: Apache-2.0
"""Accumulation of Kronecker factors: ``factor <- decay·factor + scale·xᵀx``."""

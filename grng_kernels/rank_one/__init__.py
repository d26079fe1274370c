# SPDX-License-Identifier: Apache-2.0
"""Rank-1 natural gradients: ``(damping·I + u uᵀ)⁻¹ g``."""

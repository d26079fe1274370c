# SPDX-License-Identifier: Apache-2.0
"""Kronecker-preconditioned gradients: ``left · grad · right``."""

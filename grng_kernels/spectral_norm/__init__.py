# SPDX-License-Identifier: Apache-2.0
"""The spectral norm of symmetric PSD matrices, with a certified upper bound."""

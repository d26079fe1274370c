# SPDX-License-Identifier: Apache-2.0
"""What a layer's Kronecker factors are made of, and how they are collected from a model."""

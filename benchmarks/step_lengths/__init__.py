# SPDX-License-Identifier: Apache-2.0
"""Rules for the length of RING's step, each a small subclass, and the study that compares them."""

# SPDX-License-Identifier: Apache-2.0
"""``python -m grng compare``: optimizers side by side on real data, as table, JSON and plots."""

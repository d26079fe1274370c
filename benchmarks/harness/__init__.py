# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: one timer, one row, one file format, one plot, one table."""

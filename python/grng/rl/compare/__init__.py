# SPDX-License-Identifier: Apache-2.0
"""``python -m grng compare`` for reinforcement learning: methods, runs, results, table and figure."""

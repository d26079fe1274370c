# SPDX-License-Identifier: Apache-2.0
"""Studies of one question: runs that are measured in several ways, kept as JSON, drawn as panels."""

# SPDX-License-Identifier: Apache-2.0
"""One optimizer per file."""

# SPDX-License-Identifier: Apache-2.0
"""Small adapters to other packages, which are imported only where they are used."""

# SPDX-License-Identifier: Apache-2.0
"""The search for an optimizer's settings: the same number of trials and the same width for each."""

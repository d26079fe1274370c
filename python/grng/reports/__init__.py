# SPDX-License-Identifier: Apache-2.0
"""What an optimizer says about itself: tables, numbers for loggers, memory."""

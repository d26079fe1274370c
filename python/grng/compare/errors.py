# SPDX-License-Identifier: Apache-2.0
"""The error of a command line that asks for something that does not exist."""


class UsageError(ValueError):
    """A wrong argument; the command prints the message as one line and exits with code 2."""

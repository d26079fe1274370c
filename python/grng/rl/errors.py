# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between a trainer and its environments."""


class RLError(ValueError):
    """An argument, an environment or a checkpoint that cannot be trained with; says which and why."""


class EnvironmentUnavailable(RLError):
    """The environment needs a package that is not installed; names the extra to install."""

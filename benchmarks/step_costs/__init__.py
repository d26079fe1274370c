# SPDX-License-Identifier: Apache-2.0
"""What a whole training step costs, part by part: models, optimizers, clocks, the picture."""

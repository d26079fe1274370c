# SPDX-License-Identifier: Apache-2.0
"""Natural-gradient optimizers that replace AdamW in one line, on the fused kernels of grng_kernels."""

from grng.optim.checks import PreconditionerError
from grng.optim.kfac import KFAC
from grng.optim.loko import LoKO
from grng.optim.rank_one import RankOneNPG
from grng.optim.reng import RENG
from grng.optim.ring import RING
from grng.optim.rkalman import RKalman
from grng.optim.sophia import SophiaG, SophiaH
from grng.reports.memory import MemoryEstimate, memory_estimate
from grng_kernels import __version__

__all__ = [
    "KFAC",
    "RENG",
    "RING",
    "LoKO",
    "MemoryEstimate",
    "PreconditionerError",
    "RKalman",
    "RankOneNPG",
    "SophiaG",
    "SophiaH",
    "__version__",
    "memory_estimate",
]

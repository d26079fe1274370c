# SPDX-License-Identifier: Apache-2.0
"""Every benchmark in one process: ceilings, then a table, a JSON and a picture per operation."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import bench_damped_inverse
import bench_grafting
import bench_kalman_update
import bench_kron_factor
import bench_kron_factor_conv2d
import bench_precondition
import bench_rank_one
import bench_rank_one_step
from harness import cli

BENCHES = {
    module.BENCH.op: module.BENCH
    for module in (
        bench_kron_factor,
        bench_kron_factor_conv2d,
        bench_damped_inverse,
        bench_kalman_update,
        bench_precondition,
        bench_rank_one,
        bench_rank_one_step,
        bench_grafting,
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen benchmarks; return 1 where a result of ours is wrong."""
    parser = cli.parser("Benchmarks of grng_kernels, against PyTorch on this machine.")
    parser.add_argument("--only", help=f"comma separated, of: {', '.join(BENCHES)}")
    arguments = parser.parse_args(argv)
    names = arguments.only.split(",") if arguments.only else list(BENCHES)
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        parser.error(f"--only must be of {', '.join(BENCHES)}, got {', '.join(unknown)}")
    return cli.run([BENCHES[name] for name in names], arguments)


if __name__ == "__main__":
    sys.exit(main())

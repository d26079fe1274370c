# SPDX-License-Identifier: Apache-2.0
"""The environment and the ceilings of this machine, as every result file has them."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import cli
from harness.ceilings import measure_ceilings
from harness.environment import describe, slug
from harness.files import write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the last line holds the ceilings."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--json", type=Path, help="also write here")
    arguments: argparse.Namespace = parser.parse_args(argv)
    plan = cli.plan_from(arguments)
    environment = describe(plan.device)
    ceilings = measure_ceilings(plan)
    if arguments.json:
        content = {
            "slug": slug(environment),
            "environment": environment,
            "ceilings": dataclasses.asdict(ceilings),
        }
        write_json(arguments.json, content)
    for name, value in environment.items():
        print(f"{name}: {value}")
    print(cli.ceilings_line(ceilings))
    return 0


if __name__ == "__main__":
    sys.exit(main())

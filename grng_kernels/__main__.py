# SPDX-License-Identifier: Apache-2.0
"""``python -m grng_kernels info | check | bench``."""

import argparse
import subprocess
import sys
from pathlib import Path

import grng_kernels
from grng_kernels import _machine, _selfcheck


def _info() -> int:
    print(f"grng_kernels {grng_kernels.__version__}")
    for name, value in _machine.facts().items():
        print(f"  {name:15s} {value}")
    print("backends")
    for name, status in grng_kernels.backends().items():
        print(f"  {name:15s} {'yes' if status.available else 'no ':3s}  {status.reason}")
    return 0


def _check() -> int:
    rows = _selfcheck.check_all()
    print("largest error against the fp64 reference, relative to the largest value; fp32 inputs")
    print(f"{'op':27s} {'backend':18s} {'error':>9s} {'PyTorch':>9s}")
    for row in rows:
        verdict = "ok" if row.ok else f"FAILED {row.note}".rstrip()
        print(
            f"{row.op:27s} {row.backend:18s} {row.error:9.1e} {row.reference_error:9.1e}  {verdict}"
        )
    failed = sum(not row.ok for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} within twice the error of PyTorch")
    return 1 if failed else 0


def _bench(arguments: list[str]) -> int:
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "run.py"
    if not script.is_file():
        print(
            "bench: the benchmarks are in the source repository, not in the installed package",
            file=sys.stderr,
        )
        return 2
    return subprocess.call([sys.executable, str(script), *arguments])


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m grng_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="backends, versions, CPU features, GPU")
    commands.add_parser("check", help="every op on every backend here, against the fp64 reference")
    commands.add_parser(
        "bench", help="the kernel benchmarks; further options go to them", add_help=False
    )
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "bench":
        return _bench(rest)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return _info() if arguments.command == "info" else _check()


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Runs each file of tests/interpreter in a process with TRITON_INTERPRET=1 and reports its failures."""

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
# A file each: the workers of a parallel run share them.
FILES = sorted((TESTS / "interpreter").glob("test_*.py"))


def problem():
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import numpy
    import triton

    # Triton 3.6 converts one-element arrays to numbers, which numpy 2.4 made an error.
    if triton.__version__.startswith("3.6") and tuple(
        map(int, numpy.__version__.split(".")[:2])
    ) >= (2, 4):
        return f"the interpreter of triton {triton.__version__} needs numpy < 2.4"
    return None


def test_the_files_are_found():
    assert len(FILES) >= 7


@pytest.mark.skipif(problem() is not None, reason=str(problem()))
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("test_"))
def test_triton_kernels_in_the_interpreter(file, tmp_path):
    report = tmp_path / "report.xml"
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "GRNG_BACKEND"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", f"--junitxml={report}", str(file)],
        cwd=TESTS,
        env=environment | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert report.exists(), done.stdout + done.stderr
    cases = list(xml.etree.ElementTree.parse(report).getroot().iter("testcase"))
    failed = [
        f"{case.get('name')}\n{entry.text}"
        for case in cases
        for entry in case
        if entry.tag in ("failure", "error")
    ]
    if failed:
        pytest.fail(
            f"{len(failed)} of {len(cases)} failed\n\n" + "\n\n".join(failed), pytrace=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(cases) > 5, "the tests were not collected"
    assert not any(entry.tag == "skipped" for case in cases for entry in case)

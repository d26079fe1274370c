# SPDX-License-Identifier: Apache-2.0
"""Every CUDA file compiles for every architecture without spills. Skipped where there is no nvcc."""

import pytest

from tests.aot import resources

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(resources.find_nvcc() is None, reason="nvcc was not found"),
]
ARCHS = pytest.mark.parametrize("arch", resources.CUDA_ARCHS)


def test_there_are_sources():
    assert resources.CUDA_SOURCES


@ARCHS
@pytest.mark.parametrize("source", resources.CUDA_SOURCES, ids=lambda s: s.stem)
def test_kernels_do_not_spill(source, arch, tmp_path):
    reports, said = resources.report_cuda(source, arch, tmp_path)
    assert len(reports) >= source.read_text(encoding="utf-8").count("__global__"), said
    for report in reports:
        assert 0 < report.registers <= 255, report
        assert report.stack == 0, report
        assert report.spills == 0, report
        assert report.shared <= 48 * 1024, "static shared memory ends there"


@ARCHS
def test_small_inverses_leave_room_for_other_blocks(arch, tmp_path, record_property):
    [source] = [s for s in resources.CUDA_SOURCES if s.stem == "damped_inverse_small"]
    reports, said = resources.report_cuda(source, arch, tmp_path)
    # Of a list that fits in 4 KB of parameters, and of one that needs 32.
    assert len(reports) == 2, said
    for report in reports:
        record_property(report.name, f"{report.registers} registers, {report.shared} bytes shared")
        threads, blocks = 128, 3
        assert report.registers * threads * blocks <= 64 * 1024, report
        assert report.shared * blocks <= resources.SHARED_LIMIT[int(arch.rstrip("a"))], report


def test_the_check_of_spills_has_teeth(tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text(
        'extern "C" __global__ void __launch_bounds__(1024, 2) f(float* x) {\n'
        "  float v[64];\n"
        "  #pragma unroll\n"
        "  for (int i = 0; i < 64; ++i) v[i] = x[i * 7 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "  #pragma unroll\n"
        "  for (int i = 0; i < 64; ++i) x[i * 9 + threadIdx.x] = v[i] * v[63 - i];\n"
        "}\n"
    )
    [report], _ = resources.report_cuda(source, "90a", tmp_path)
    assert report.spills > 0

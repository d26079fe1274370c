# SPDX-License-Identifier: Apache-2.0
"""What a GPU kernel takes: registers, shared memory, spills, tensor-core instructions. Needs no GPU.

Triton kernels are compiled for a named architecture, CUDA files by nvcc; both are read with the tools
that come with Triton. Run as a script, this prints the table.
"""

import json
import pathlib
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass

ROOT = pathlib.Path(__file__).resolve().parents[2]
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TRITON_ARCHS = (80, 90, 100)
CUDA_ARCHS = ("80", "90a", "100")
# Shared memory that one block may have, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_INSTRUCTIONS = ("HMMA", "DMMA", "HGMMA", "UTCHMMA", "UTCQMMA")


@dataclass(frozen=True)
class Report:
    """One compiled kernel."""

    name: str
    arch: str
    registers: int
    stack: int
    spills: int  # instructions that read or write local memory
    shared: int  # bytes
    tensor: int  # tensor-core instructions
    hopper: int = 0  # of these, wgmma: asynchronous, of a whole warp group
    copies: int = 0  # asynchronous copies of 16 bytes from global to shared memory


def _triton_tool(name, *arguments):
    import triton

    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=True)
    return done.stdout


def _count(sass, *operations):
    return sum(len(re.findall(rf"\b{op}\b[. ]", sass)) for op in operations)


def read_cubin(cubin):
    """Return ``{kernel: (registers, stack, shared)}`` and the instructions of each kernel."""
    usage = _triton_tool("cuobjdump", "--dump-resource-usage", cubin)
    found = {
        name: tuple(map(int, numbers))
        for name, *numbers in re.findall(
            r"Function ([^:\s]+):\s*\n?\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage
        )
    }
    sass = _triton_tool("nvdisasm", "-c", cubin)
    parts = re.split(r"^\.text\.([^\s:]+):", sass, flags=re.M)
    return found, dict(zip(parts[1::2], parts[2::2], strict=True))


# ---- Triton ----


def compile_triton(kernel, signature, constexprs, aligned, arch, *, num_warps, num_stages):
    """Compile a ``@triton.jit`` function as a launch would; return Triton's CompiledKernel.

    Args:
        kernel: The function.
        signature: ``{argument: type}``, such as ``"*bf16"``, ``"i32"`` or ``"constexpr"``, in order.
        constexprs: ``{argument: value}``.
        aligned: Arguments that are multiples of 16, as the launcher finds out by itself.
        arch: 80, 90 or 100.
        num_warps: Warps of a block.
        num_stages: Depth of the pipeline.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(signature)
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def sass_of(compiled):
    """Return the machine code of a CompiledKernel as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        [code] = read_cubin(file.name)[1].values()
    return code


def report_triton(compiled, name, arch):
    """Return the :class:`Report` of a CompiledKernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = read_cubin(file.name)
    [(registers, stack, _)] = usage.values()
    [code] = sass.values()
    return Report(
        name=name,
        arch=f"sm_{arch}",
        registers=registers,
        stack=stack,
        spills=_count(code, "LDL", "STL"),
        shared=compiled.metadata.shared,
        tensor=_count(code, *TENSOR_INSTRUCTIONS),
        hopper=_count(code, "HGMMA"),
        copies=len(re.findall(r"\bLDGSTS\.\S*128", code)),
    )


# ---- the factor update ----

KRON_FACTOR_KERNELS = ("_products_kernel", "_commit_kernel")
CONV2D_KERNELS = ("_conv2d_products_kernel", "_conv2d_extremes_kernel")
POINTERS = {
    "table_ptr": "*i64", "ends_ptr": "*i64", "info_ptr": "*i32", "sums_ptr": "*fp32",
    "column_sums_ptr": "*fp32", "extremes_ptr": "*i32", "scales_ptr": "*fp32", "decay": "fp32",
}  # fmt: skip


def torch_dtype(name):
    """The torch dtype that Triton calls ``name``."""
    import torch

    return {
        "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64,
    }[name]  # fmt: skip


def kron_factor_variants(*, conv2d=False, dtypes=("bf16", "fp32")):
    """Yield ``(dtype, tile, aligned, config)`` of every variant; one for convolutions is never aligned.

    bf16 stands for fp16 too: they differ in one field of the tensor instructions.
    """
    from grng_kernels.kron_factor import triton_conv2d, triton_kernel

    module = triton_conv2d if conv2d else triton_kernel
    for dtype in dtypes:
        for tile, variants in (
            module.TILES_FP32 if dtype == "fp32" else module.TILES_16BIT
        ).items():
            for aligned in (False,) if conv2d else (True, False):
                yield dtype, tile, aligned, variants.config(aligned)


def _compile_of_kron_factor(function, constants, arch, *, num_warps, num_stages):
    types = {**POINTERS, **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "i32") for name in function.arg_names}
    # Workspaces and tables come from torch's allocator; what the caller owns is read from the table.
    aligned = [name for name, kind in signature.items() if kind.startswith("*")]
    return compile_triton(
        function, signature, constants, aligned, arch, num_warps=num_warps, num_stages=num_stages
    )


def compile_products(dtype, config, arch, *, aligned, bias, conv2d=False, precision=None):
    """Compile one variant of a products kernel as a launch would."""
    from grng_kernels.kron_factor import triton_conv2d, triton_kernel

    warps = config.hopper_warps if arch >= 90 else config.num_warps
    if conv2d:
        function = triton_conv2d._conv2d_products_kernel
        constants = triton_conv2d.products_constants(torch_dtype(dtype), config, warps, bias=bias)
    else:
        function = triton_kernel._products_kernel
        constants = triton_kernel.products_constants(
            torch_dtype(dtype), config, warps, aligned=aligned, bias=bias
        )
    if precision:
        constants["PRECISION"] = precision
    return _compile_of_kron_factor(
        function, constants, arch, num_warps=warps, num_stages=config.num_stages
    )


def compile_commit(arch, *, bias, decay_tensor=False):
    """Compile the last launch of the factor update."""
    from grng_kernels.kron_factor import triton_kernel

    constants = {
        "BIAS": bias, "DECAY_TENSOR": decay_tensor, "BLOCK": triton_kernel.COMMIT_BLOCK,
        "UNROLL": triton_kernel.UNROLL, "EXTREMES": triton_kernel.EXTREMES,
        "CHUNK": triton_kernel.CHUNK,
    }  # fmt: skip
    function = triton_kernel._commit_kernel
    with_pointer = {"decay": "*fp32"} if decay_tensor else {}
    types = {**POINTERS, **with_pointer, **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "i32") for name in function.arg_names}
    # A decay and a scale of the caller may lie anywhere.
    aligned = [n for n, kind in signature.items() if kind.startswith("*") and n != "decay"]
    return compile_triton(
        function, signature, constants, aligned, arch,
        num_warps=triton_kernel.COMMIT_WARPS, num_stages=3,
    )  # fmt: skip


def compile_conv2d_extremes(dtype, arch):
    """Compile the check of the convolution."""
    from grng_kernels.kron_factor import triton_conv2d, triton_kernel

    constants = {
        "DTYPE": triton_kernel.TRITON_DTYPES[torch_dtype(dtype)],
        "BLOCK": triton_conv2d.EXTREMES_BLOCK,
        "CHUNK": triton_kernel.CHUNK,
    }
    return _compile_of_kron_factor(
        triton_conv2d._conv2d_extremes_kernel, constants, arch,
        num_warps=triton_conv2d.EXTREMES_WARPS, num_stages=3,
    )  # fmt: skip


def kron_factor_reports():
    """Yield the reports of all variants of the factor update, with a bias: it takes the most registers."""
    for arch in TRITON_ARCHS:
        for conv2d in (False, True):
            for dtype, tile, aligned, config in kron_factor_variants(conv2d=conv2d):
                compiled = compile_products(
                    dtype, config, arch, aligned=aligned, bias=True, conv2d=conv2d
                )
                kind = "conv2d" if conv2d else "aligned" if aligned else "general"
                yield report_triton(compiled, f"kron_factor-{dtype}-{tile}-{kind}", arch)
        yield report_triton(compile_commit(arch, bias=True), "kron_factor-commit", arch)
        for dtype in ("bf16", "fp32"):
            compiled = compile_conv2d_extremes(dtype, arch)
            yield report_triton(compiled, f"kron_factor-conv2d-extremes-{dtype}", arch)


def precondition_variants():
    """Yield every variant of the two-sided product: each gradient dtype, tile, alignment and bias."""
    import torch

    from grng_kernels.precondition.triton_kernel import CONFIGS_ALIGNED, CONFIGS_ANY, Variant

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for block_s in CONFIGS_ALIGNED:
            yield Variant(dtype, block_s, aligned=True, bias=False)
        for block_s in CONFIGS_ANY:
            for bias in (False, True):
                yield Variant(dtype, block_s, aligned=False, bias=bias)


def variant_name(variant):
    """A short name for tables and test ids."""
    dtype = str(variant.dtype).removeprefix("torch.")
    layout = "aligned" if variant.aligned else "any-bias" if variant.bias else "any"
    return f"{dtype}-{variant.block_s}-{layout}"


PRECONDITION_KERNELS = ("_partial_kernel", "_finish_kernel", "_dots_kernel")


def compile_precondition(variant, arch, kernel="_partial_kernel", *, dots=True):
    """Compile one kernel of one variant of the two-sided product as ``launch`` does."""
    import triton.language as tl

    from grng_kernels.precondition import triton_kernel

    function = getattr(triton_kernel, kernel)
    config = variant.config
    constants = {
        "GRAD": triton_kernel.DTYPES[variant.dtype],
        "ALIGNED": variant.aligned,
        "BIAS": variant.bias,
        "DOTS": dots,
        "PIECE": tl.bfloat16,
        "BLOCK_S": config.block_s,
        "BLOCK_D": config.block_d,
        "BLOCK_K": config.block_k,
        "FINISH_D": config.finish_d,
        "AT_ONCE": triton_kernel.SPLITS_AT_ONCE,
        "BLOCK": triton_kernel.DOTS_BLOCK,
    }
    types = {
        "table_ptr": "*i64", "sums_ptr": "*fp32", "parts_ptr": "*fp32", "dots_ptr": "*fp32",
        "programs_at": "i32", "stride": "i32", **dict.fromkeys(constants, "constexpr"),
    }  # fmt: skip
    signature = {name: types[name] for name in function.arg_names}
    warps = {
        "_partial_kernel": config.num_warps,
        "_finish_kernel": config.finish_warps,
        "_dots_kernel": 1,
    }
    return compile_triton(
        function,
        signature,
        {name: value for name, value in constants.items() if name in signature},
        [name for name in signature if name.endswith("_ptr")],
        arch,
        num_warps=warps[kernel],
        num_stages=config.num_stages if kernel == "_partial_kernel" else 3,
    )


# ---- CUDA ----


# ---- rank-one preconditioning ----

RANK_ONE_KERNELS = ("_dots_kernel", "_coefficient_kernel", "_apply_kernel")


def compile_rank_one(dtype, arch, kernel):
    """Compile one kernel of ``rank1_precondition``; ``dtype`` is ``"fp32"``, ``"bf16"``, ..."""
    from grng_kernels.rank_one import triton_kernel

    function = getattr(triton_kernel, kernel)
    given = {
        "DTYPE": triton_kernel.DTYPES[torch_dtype(dtype)],
        "CHUNK": triton_kernel.CHUNK,
        "BLOCK": triton_kernel.BLOCK,
    }
    types = {
        "table_ptr": "*i64", "sums_ptr": "*fp64", "coefficient_ptr": "*fp64", "damping_ptr": "*fp64",
        "chunks": "i32",
    }  # fmt: skip
    signature = {n: types.get(n, "constexpr") for n in function.arg_names}
    constants = {n: given[n] for n, kind in signature.items() if kind == "constexpr"}
    pointers = [n for n, kind in signature.items() if kind.startswith("*")]
    return compile_triton(
        function, signature, constants, pointers, arch,
        num_warps=triton_kernel.WARPS, num_stages=3,
    )  # fmt: skip


def find_nvcc():
    """Return the path of nvcc, or None."""
    return shutil.which("nvcc")


def readable(symbol):
    """The name of a kernel out of its mangled symbol, with the template arguments that are bool."""
    found = re.search(r"\d([a-z]\w*?_kernel)((?:I(?:Lb[01]E)+E)?)", symbol)
    if not found:
        return symbol
    flags = [
        "false" if flag == "0" else "true" for flag in re.findall(r"Lb([01])E", found.group(2))
    ]
    return found.group(1) + (f"<{', '.join(flags)}>" if flags else "")


def report_cuda(source, arch, folder):
    """Compile one .cu file for ``"80"``, ``"90a"`` or ``"100"`` and report each of its kernels.

    Returns:
        A list of :class:`Report`, and what nvcc said (``-Xptxas -v``).
    """
    cubin = pathlib.Path(folder) / f"{source.stem}.sm_{arch}.cubin"
    done = subprocess.run(
        [
            *(find_nvcc(), "-O3", "-std=c++20", f"-arch=sm_{arch}", "-Xptxas", "-v,-warn-spills"),
            *("-cubin", str(source), "-o", str(cubin)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"nvcc failed on {source.name} for sm_{arch}:\n{done.stderr}")
    reports = []
    for part in done.stderr.split("Compiling entry function ")[1:]:
        name = readable(re.match(r"'(\w+)'", part).group(1))
        registers, stack, stores, loads, shared = (
            int(found.group(1)) if (found := re.search(pattern, part)) else 0
            for pattern in (
                r"Used (\d+) registers",
                r"(\d+) bytes stack frame",
                r"(\d+) bytes spill stores",
                r"(\d+) bytes spill loads",
                r"(\d+) bytes smem",
            )
        )
        reports.append(Report(name, f"sm_{arch}", registers, stack, stores + loads, shared, 0))
    return reports, done.stderr


def all_reports():
    """Yield the report of every Triton variant and of every CUDA kernel."""
    yield from kron_factor_reports()
    for variant in precondition_variants():
        for arch in TRITON_ARCHS:
            for kernel in PRECONDITION_KERNELS[:2]:
                compiled = compile_precondition(variant, arch, kernel)
                name = f"precondition{kernel.removesuffix('_kernel')}-{variant_name(variant)}"
                yield report_triton(compiled, name, arch)
    for kernel in RANK_ONE_KERNELS:
        for arch in TRITON_ARCHS:
            compiled = compile_rank_one("fp32", arch, kernel)
            yield report_triton(compiled, f"rank_one{kernel.removesuffix('_kernel')}", arch)
    from tests.aot import kalman_update

    yield from kalman_update.reports()
    if find_nvcc():
        with tempfile.TemporaryDirectory() as folder:
            for source in CUDA_SOURCES:
                for arch in CUDA_ARCHS:
                    yield from report_cuda(source, arch, folder)[0]


if __name__ == "__main__":
    for report in all_reports():
        print(json.dumps(asdict(report)))

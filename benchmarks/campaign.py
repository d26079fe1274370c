# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in one command of nine minutes, without a network.

Each stage has its own budget and runs in a process of its own: one that fails, hangs or overruns is
reported and does not stop the rest. Files go to benchmarks/results/<gpu>/ and, where the variable OUT
names a folder, there too. The table of the stages is the last thing printed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.files import text_table, write_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NO_GPU = 3
TOTAL_S = 540.0
# Time that a stage gets for stopping by itself before it is stopped.
GRACE_S = 6.0
# A stage that would get less than this is not begun.
LEAST_S = 5.0
KERNELS = (
    "_products_kernel",
    "_commit_kernel",
    "_partial_kernel",
    "_finish_kernel",
    "_dots_kernel",
    "_conv2d_products_kernel",
    "_conv2d_extremes_kernel",
    "gram_partial_kernel",
    "gram_reduce_kernel",
    "apply_kernel",
)


@dataclass(frozen=True)
class Context:
    """What the stages share: the folder of this run's files and the compute capability."""

    folder: Path
    capability: tuple[int, int] | None


# A command, or the reason why the stage cannot run here.
Command = Callable[[Context], "list[str] | str"]


@dataclass(frozen=True)
class Stage:
    """One step of the campaign."""

    name: str
    budget_s: float
    command: Command
    uncached: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a stage ended."""

    name: str
    status: str
    seconds: float
    detail: str


def find_gpu() -> tuple[tuple[int, int] | None, str]:
    """Ask the driver, without torch.

    Returns:
        ``(compute capability or None, why not)``.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None, "no CUDA driver"
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None, "the CUDA driver sees no device"
    device, numbers = ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()]
    driver.cuDeviceGet(ctypes.byref(device), 0)
    # 75 and 76: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
    for number, attribute in zip(numbers, (75, 76), strict=True):
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    return (numbers[0].value, numbers[1].value), ""


def _script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(HERE / name), *arguments]


def _machine(context: Context) -> list[str]:
    return _script("machine.py", "--device", "cuda", "--json", str(context.folder / "machine.json"))


def _build(context: Context) -> list[str] | str:
    if shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME"):
        return "no nvcc on PATH and no CUDA_HOME: the CUDA kernels are not built"
    # Only this GPU: sm_90a holds what sm_90 lacks, and three architectures take three times as long.
    known = {(9, 0): "9.0a", (10, 0): "10.0", (8, 0): "8.0"}
    arch = known.get(context.capability or (0, 0))
    return _script(
        "build_extension.py", "--pip-timeout-s", "60", *(["--arch", arch] if arch else [])
    )


def _correctness(context: Context) -> list[str]:
    target = str(context.folder / "correctness.json")
    return _script("gpu_correctness.py", "--device", "cuda", "--budget-s", "40", "--json", target)


def _tests(context: Context) -> list[str] | str:
    # hypothesis: what the tests' conftest imports.
    missing = [m for m in ("pytest", "hypothesis") if importlib.util.find_spec(m) is None]
    if missing:
        return f"{', '.join(missing)} not installed: the gpu-marked tests were not run"
    return [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--maxfail=20", str(ROOT / "tests")]


def _sanitizer() -> str | None:
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    inside = [f"{p}/{sub}" for p in places if p for sub in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(inside)
    )


def _sanitize(tool: str) -> Command:
    def command(context: Context) -> list[str] | str:
        program = _sanitizer()
        if program is None:
            return "compute-sanitizer was not found"
        options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        # torch's own kernels are slow under watch and not ours to judge.
        usage = subprocess.run(
            [program, "--help"], capture_output=True, text=True, timeout=20, check=False
        ).stdout
        flag = next(
            (f for f in ("--kernel-regex", "--kernel-name", "--filter") if f in usage), None
        )
        if flag and tool != "memcheck":
            for name in KERNELS:
                options += [flag, f"kns={name}"]
        return [program, *options, *_script("sanitize_subset.py")]

    return command


def _bench(ops: str, budget_s: int, *more: str) -> Command:
    def command(context: Context) -> list[str]:
        limits = ["--budget-s", str(budget_s), "--attempts", "1", "--rounds", "10"]
        target = ["--out", str(context.folder)]
        return _script("run.py", "--device", "cuda", "--only", ops, *more, *limits, *target)

    return command


def _step(context: Context) -> list[str]:
    optimizers = "RING;RING, refresh 1;AdamW foreach;AdamW fused"
    arguments = ["--workloads", "mlp,vit-b-lora", "--optimizers", optimizers, "--no-memory"]
    return _script("bench_step.py", *arguments, "--out", str(context.folder))


STAGES = (
    Stage("machine", 35, _machine),
    Stage("build", 80, _build),
    Stage("correctness", 55, _correctness),
    Stage("gpu tests", 70, _tests),
    Stage("memcheck", 45, _sanitize("memcheck"), uncached=True),
    Stage("factors", 70, _bench("kron_factor", 50, "--sizes", "64,256,768,3072")),
    Stage(
        "other ops", 90, _bench("kalman_update,damped_inverse,precondition,rank_one,grafting", 14)
    ),
    Stage("step", 25, _step),
    Stage("racecheck", 35, _sanitize("racecheck"), uncached=True),
    Stage("initcheck", 35, _sanitize("initcheck"), uncached=True),
)
BENCHMARK_LOGS = ("factors.log", "other-ops.log", "step.log")


def child_environment(*, uncached: bool = False) -> dict[str, str]:
    """Return the environment of a stage: the packages of this checkout come first."""
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    if uncached:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return environment


def last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    try:
        lines = [ln.strip() for ln in log.read_text(errors="replace").splitlines() if ln.strip()]
    except OSError:
        return ""
    summaries = [line for line in lines if "ERROR SUMMARY" in line]
    return (summaries or lines or [""])[-1][:150]


def run_stage(stage: Stage, context: Context, remaining_s: float, logs: Path) -> Outcome:
    """Run one stage within its budget and what is left of the whole.

    Args:
        stage: Which.
        context: Shared by all.
        remaining_s: Of the campaign.
        logs: Folder for its output.

    Returns:
        How it ended; no exception of a stage gets out.
    """
    begun = time.monotonic()
    budget = min(stage.budget_s, remaining_s - GRACE_S)
    if budget < LEAST_S:
        return Outcome(stage.name, "no time", 0.0, "the time of the campaign was used up")
    try:
        command = stage.command(context)
    except Exception as error:
        return Outcome(stage.name, "failed", time.monotonic() - begun, f"{error}"[:150])
    if isinstance(command, str):
        return Outcome(stage.name, "skipped", time.monotonic() - begun, command)
    log = logs / f"{stage.name.replace(' ', '-')}.log"
    with log.open("w") as file:
        # A process group of its own: on a timeout its children are stopped with it, nothing else.
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=child_environment(uncached=stage.uncached),
            start_new_session=True,
        )
        status = _wait(process, budget)
    return Outcome(stage.name, status, time.monotonic() - begun, last_line(log))


def _wait(process: subprocess.Popen[bytes], budget_s: float) -> str:
    """Return the status of a stage; stop it where it overruns."""
    try:
        code = process.wait(timeout=budget_s)
    except subprocess.TimeoutExpired:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, sign)
                process.wait(timeout=GRACE_S / 2)
                break
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        return "overran"
    return "ok" if code == 0 else f"failed ({code})"


def stage_table(outcomes: Sequence[Outcome]) -> str:
    """Return the table that ends the campaign."""
    lines = [(o.name, o.status, f"{o.seconds:.0f}", o.detail) for o in outcomes]
    widest = max(len(line[3]) for line in lines)
    return text_table(
        ("stage", "status", "s", "what it said".ljust(widest)),
        [(a, b, c, d.ljust(widest)) for a, b, c, d in lines],
    )


def dry_run(stages: Sequence[Stage]) -> str:
    """Return the stages with their budgets and commands, without running or importing anything."""
    context = Context(Path("OUT"), (9, 0))
    lines = []
    for stage in stages:
        command = stage.command(context)
        text = f"not here: {command}" if isinstance(command, str) else " ".join(command)
        text = text.replace(sys.executable, "python").replace(f"{ROOT}{os.sep}", "")
        lines.append(f"{stage.name:<12} {stage.budget_s:>4.0f} s  {text}")
    total = sum(stage.budget_s for stage in stages)
    return "\n".join([*lines, f"{'together':<12} {total:>4.0f} s"])


def _keep(folder: Path, out: Path) -> Path:
    """Move this run's files to the results of the GPU and to OUT; return the former."""
    try:
        slug = str(json.loads((folder / "machine.json").read_text())["slug"])
    except (OSError, ValueError, KeyError):
        slug = "unknown-gpu"
    target = HERE / "results" / slug
    for place in (target, out / "results" / slug):
        shutil.copytree(folder, place, dirs_exist_ok=True)
    return target


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages.

    Args:
        argv: Arguments, or None for those of the process.

    Returns:
        0 where every stage was fine or could not run here, 1 where one failed, 3 without a GPU.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="print the stages, run nothing")
    parser.add_argument("--only", help="comma separated names of stages")
    parser.add_argument("--budget-s", type=float, default=TOTAL_S, help="of everything together")
    arguments = parser.parse_args(argv)
    names = arguments.only.split(",") if arguments.only else [stage.name for stage in STAGES]
    unknown = set(names) - {stage.name for stage in STAGES}
    if unknown:
        parser.error(f"unknown stages: {', '.join(sorted(unknown))}")
    stages = [stage for stage in STAGES if stage.name in names]
    if arguments.dry_run:
        print(dry_run(stages))
        return 0
    capability, why = find_gpu()
    if capability is None:
        print(f"campaign: {why}; nothing was run")
        return NO_GPU
    return campaign(stages, capability, arguments.budget_s)


def campaign(stages: Sequence[Stage], capability: tuple[int, int], budget_s: float) -> int:
    """Run stages one after another, keep their files, print the table."""
    deadline = time.monotonic() + budget_s
    out = Path(os.environ.get("OUT") or ROOT / "build" / "campaign")
    logs, folder = out / "logs", ROOT / "build" / "campaign-files"
    shutil.rmtree(folder, ignore_errors=True)
    for path in (logs, folder):
        path.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for stage in stages:
        outcome = run_stage(stage, Context(folder, capability), deadline - time.monotonic(), logs)
        outcomes.append(outcome)
        print(f"{outcome.name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
        # After every stage: what is known so far survives if this process is stopped.
        write_json(folder / "campaign.json", {"stages": [vars(o) for o in outcomes]})
        _keep(folder, out)
    for log in (logs / name for name in BENCHMARK_LOGS):
        if log.exists():
            print(log.read_text(errors="replace"))
    print(stage_table(outcomes))
    return int(any(o.status not in ("ok", "skipped") for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())

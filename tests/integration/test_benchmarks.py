# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own arithmetic, and that their commands run where there is no GPU."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmark_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


def make_case(**changes):
    from harness.case import Case

    fields = dict(
        op="op",
        shape="s",
        dims={},
        dtype="float32",
        bytes=1e9,
        flops=1e9,
        error=lambda outputs: 0.0,
        limit=1e-5,
        contenders=[],
    )
    return Case(**(fields | changes))


def test_contenders_take_turns_and_keep_their_medians():
    from harness.timer import CpuStopwatch, Effort, interleave

    clock, order = FakeClock(), []
    durations = {"a": iter([1.0, 1.0, 9.0, 1.0, 2.0, 3.0]), "b": iter([5.0] * 6)}

    def call(name):
        def run():
            order.append(name)
            clock.work(next(durations[name]) / 1e3)

        return run

    effort = Effort(rounds=5, min_ms=0.0, warmup_ms=0.0, max_s=1e9)
    timings = interleave({"a": call("a"), "b": call("b")}, CpuStopwatch(clock), effort, clock=clock)
    assert order == ["a", "b"] * 6
    assert timings["a"].p50 == pytest.approx(2.0)
    assert timings["a"].p20 == pytest.approx(1.0)
    assert timings["a"].p80 == pytest.approx(4.2)
    assert timings["b"] == pytest.approx((5.0, 5.0, 5.0, 5))


def test_short_calls_are_repeated_and_the_flush_is_not_timed():
    from harness.timer import CpuStopwatch, Effort, interleave

    clock, calls = FakeClock(), []

    def short():
        calls.append(clock.now)
        clock.work(0.001)

    effort = Effort(rounds=3, min_ms=10.0, warmup_ms=0.0)
    timings = interleave({"short": short}, CpuStopwatch(clock), effort, clock=clock)
    assert len(calls) == 1 + 3 * 10
    assert timings["short"].p50 == pytest.approx(1.0)

    calls.clear()
    cold = interleave(
        {"short": short}, CpuStopwatch(clock), effort, clock=clock, before=lambda: clock.work(7.0)
    )
    assert len(calls) == 1 + 3
    assert cold["short"].p50 == pytest.approx(1.0)


def test_rounds_end_when_the_time_is_up_but_not_before_the_least_number():
    from harness.timer import CpuStopwatch, Effort, interleave

    clock = FakeClock()
    effort = Effort(rounds=50, min_ms=0.0, warmup_ms=0.0, max_s=1.0, min_rounds=4)
    timings = interleave(
        {"slow": lambda: clock.work(2.0)}, CpuStopwatch(clock), effort, clock=clock
    )
    assert timings["slow"].rounds == 4


@pytest.mark.parametrize(
    ("q", "expected"), [(0.0, 1.0), (0.2, 1.6), (0.5, 2.5), (0.8, 3.4), (1.0, 4.0)]
)
def test_quantiles_are_linear(q, expected):
    from harness.timer import quantile

    assert quantile([4.0, 1.0, 3.0, 2.0], q) == pytest.approx(expected)


def test_foreign_share_leaves_our_own_time_out():
    from harness.load import CpuTimes, foreign_share

    start = CpuTimes(busy=100.0, total=1000.0, own=10.0)
    end = CpuTimes(busy=100.0 + 12.0, total=1000.0 + 10.0 * os.cpu_count(), own=10.0 + 10.0)
    assert foreign_share(start, end) == pytest.approx(2.0 / (10.0 * os.cpu_count()))
    assert foreign_share(start, start._replace(total=1000.01)) is None
    assert foreign_share(None, end) is None


def test_work_under_load_is_tried_again_and_the_quietest_kept(monkeypatch):
    from harness import load

    monkeypatch.setattr(load, "SHORTEST_WINDOW_S", 0.0)
    shares = iter([0.0, 0.5, 0.0, 0.2, 0.0, 0.01])
    monkeypatch.setattr(load, "foreign_share", lambda start, end: next(shares))
    results = iter(["first", "second", "third"])
    assert load.under_watch(lambda: next(results), pause_s=0.0) == ("third", 0.01)

    shares = iter([0.0, 0.5, 0.0, 0.2])
    results = iter(["first", "second"])
    assert load.under_watch(lambda: next(results), attempts=2, pause_s=0.0) == ("second", 0.2)


def test_roofline_is_the_slower_of_arithmetic_and_memory():
    from harness.case import Contender
    from harness.row import Ceilings, make_row
    from harness.timer import Timing

    ceilings = Ceilings(copy_gb_s=100.0, tflop_s={"float32": 1.0, "bfloat16": 4.0})
    assert ceilings.floor_ms(flops=1e9, nbytes=1e9, dtype="float32") == pytest.approx(10.0)
    assert ceilings.floor_ms(flops=1e11, nbytes=1e9, dtype="float32") == pytest.approx(100.0)
    assert ceilings.floor_ms(flops=1e11, nbytes=1e9, dtype="bfloat16") == pytest.approx(25.0)

    slow_bf16 = Ceilings(100.0, {"float32": 1.0, "bfloat16": 0.1})
    assert slow_bf16.floor_ms(flops=1e11, nbytes=1e9, dtype="bfloat16") == pytest.approx(100.0)

    row = make_row(
        make_case(),
        Contender("grng", "cpu", "ours", list),
        ceilings,
        state="warm",
        mode="eager",
        timing=Timing(15.0, 20.0, 30.0, 5),
        error=1e-7,
        foreign_load=0.3,
    )
    assert (row.floor_ms, row.roofline_share) == (pytest.approx(10.0), pytest.approx(0.5))
    assert (row.gb_s, row.tflop_s) == (pytest.approx(50.0), pytest.approx(0.05))
    assert row.notes == ["foreign load 30%: upper bound"]


@pytest.mark.parametrize(("nbytes", "remark"), [(1e9, "memory"), (1e6, "the arithmetic")])
def test_what_is_faster_than_the_roofline_says_which_side_it_passed(nbytes, remark):
    from harness.case import Contender
    from harness.row import Ceilings, make_row
    from harness.timer import Timing

    row = make_row(
        make_case(bytes=nbytes, flops=1e11),
        Contender("grng", "cpu", "ours", list),
        Ceilings(copy_gb_s=100.0, tflop_s={"float32": 1.0}),
        state="warm",
        mode="eager",
        timing=Timing(5.0, 5.0, 5.0, 5),
        error=1e-7,
    )
    assert row.roofline_share == pytest.approx(20.0)
    assert [note.startswith(f"faster than {remark}") for note in row.notes] == [True]


def test_ratio_is_against_the_fastest_rival_that_is_right():
    from harness.case import Bench, Contender, Plan
    from harness.measure import measure_bench
    from harness.row import Ceilings
    from harness.timer import Effort

    right, wrong = [torch.ones(2)], [torch.zeros(2)]

    def slow():
        for _ in range(3000):
            math.sqrt(2.0)
        return right

    def broken():
        raise RuntimeError("no such kernel\nsecond line")

    case = make_case(
        error=lambda outputs: 0.0 if outputs[0].all() else 1.0,
        contenders=[
            Contender("grng", "cpu", "ours", lambda: right),
            Contender("slow", "torch", "rival", slow),
            Contender("wrong", "torch", "rival", lambda: wrong),
            Contender("naive", "torch", "yardstick", lambda: right),
            Contender("broken", "torch", "rival", broken),
        ],
    )
    plan = Plan(torch.device("cpu"), effort=Effort(3, 0.1, 0.0, 1.0, 3), attempts=1)
    ceilings = Ceilings(100.0, {"float32": 1.0})
    rows = measure_bench(
        Bench("op", "", lambda plan: iter([case])), plan, ceilings, lambda text: None
    )
    by_name = {row.provider: row for row in rows}
    assert by_name["grng"].rival == "slow"
    assert by_name["grng"].ratio > 1
    assert by_name["grng"].rival_error == 0.0
    assert by_name["wrong"].p50_ms is None
    assert by_name["wrong"].error == 1.0
    assert by_name["wrong"].notes == ["red check: error 1.0e+00 > 1e-05, not timed"]
    assert by_name["broken"].notes == ["failed: RuntimeError: no such kernel"]
    assert all(by_name[name].ratio is None for name in ("slow", "wrong", "naive", "broken"))


@pytest.mark.parametrize("missing", ["error", "rival_error"])
def test_a_ratio_without_its_errors_is_not_plotted(missing, tmp_path):
    from harness.plot import plot

    row = {
        "op": "op",
        "shape": "s",
        "p50_ms": 1.0,
        "ratio": 2.0,
        "error": 1e-7,
        "rival_error": 1e-7,
    }
    row[missing] = None
    with pytest.raises(ValueError, match=f"a ratio without {missing} is not plotted"):
        plot({"op": "op", "rows": [row]}, tmp_path / "op.png")
    assert not list(tmp_path.iterdir())


def test_error_of_a_wrong_or_infinite_result():
    from harness.case import relative_error

    judge = relative_error([torch.tensor([2.0, -4.0], dtype=torch.float64)])
    assert judge([torch.tensor([2.0, -4.0])]) == 0.0
    assert judge([torch.tensor([2.0, -3.0])]) == pytest.approx(0.25)
    assert judge([torch.tensor([2.0, math.nan])]) == math.inf
    assert judge([torch.tensor([2.0])]) == math.inf


def test_lora_shapes_share_the_input_of_query_and_value():
    from shapes import MODELS

    vit = [factor.n for factor in MODELS["vit-b16-lora-r16"].factors]
    assert (vit.count(768), vit.count(16)) == (36, 48)
    assert len(MODELS["vit-b16-lora-r16"].weights) == 48
    llama = [factor.n for factor in MODELS["llama-7b-lora-r16"].factors]
    assert (llama.count(4096), llama.count(16)) == (96, 128)
    mlp = MODELS["mlp-fashion"]
    assert mlp.inputs == (0, 1, 2)
    assert [f.n for f in mlp.factors] == [785, 257, 257, 256, 256, 10]
    assert mlp.weights == ((256, 785), (256, 257), (10, 257))


@pytest.mark.parametrize("name", ["mlp-fashion", "minilm-lora", "llama-7b-lora-r16"])
def test_every_weight_has_the_factor_of_its_input(name):
    from shapes import MODELS

    model = MODELS[name]
    orders = [model.factors[i].n for i in model.inputs]
    assert orders == [n for _, n in model.weights]
    readers = [model.inputs.count(i) for i in model.inputs]
    assert readers == ([1] * 3 if name == "mlp-fashion" else [2, 1, 2, 1] * (len(orders) // 4))


def test_convolutions_have_the_rows_and_columns_of_their_patches():
    from shapes import CONVOLUTIONS

    for c in CONVOLUTIONS["resnet50-convs"].convolutions:
        x = torch.empty(1, c.channels, c.size, c.size)
        patches = torch.nn.functional.unfold(x, c.kernel, padding=c.padding, stride=c.stride)
        assert list(patches.shape) == [1, c.order, c.places]
        assert c.rows == 16 * c.places


def test_names_of_the_other_kind_of_shapes_are_passed_over():
    from shapes import chosen_convolutions, chosen_models

    names = ("minilm-lora", "resnet50-convs")
    assert [m.name for m in chosen_models(names, ())] == ["minilm-lora"]
    assert [c.name for c in chosen_convolutions(names, ())] == ["resnet50-convs"]
    for choose in (chosen_models, chosen_convolutions):
        assert choose(("none",), names) == []
        with pytest.raises(ValueError, match=r"shapes must be of mlp-fashion, .*, got nothing"):
            choose(("nothing",), ())


def test_quick_run_writes_a_result_file(tmp_path):
    done = command(
        BENCHMARKS / "run.py", "--quick", "--device", "cpu", "--only", "rank_one", "--sizes", "16,64",
        "--rounds", "2", "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "where we lose:" in done.stdout
    content = json.loads((tmp_path / "rank_one.json").read_text())
    assert content["schema"] == 1
    assert content["quick"] is True
    assert content["ceilings"]["copy_gb_s"] > 0
    assert content["environment"]["versions"]["torch"] == torch.__version__
    ours = [row for row in content["rows"] if row["role"] == "ours"]
    assert [row["dims"]["parameters"] for row in ours] == [16, 64]
    for row in ours:
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["ratio"] > 0
        assert row["error"] < 1e-6
        assert row["rival_error"] is not None
    wanted = {"rank_one.json"} | (
        {"rank_one.png"} if importlib.util.find_spec("matplotlib") else set()
    )
    assert {path.name for path in tmp_path.iterdir()} == wanted


def test_quick_run_of_the_convolutions(tmp_path):
    done = command(
        BENCHMARKS / "run.py", "--quick", "--device", "cpu", "--only", "kron_factor_conv2d",
        "--sizes", "3", "--rounds", "2", "--no-plot", "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "kron_factor_conv2d.json").read_text())["rows"]
    assert [row["provider"] for row in rows if row["role"] == "rival"] == [
        "unfold, addmm out=",
        "double unfold",
    ]
    assert all(row["p50_ms"] is not None and row["error"] < 5e-6 for row in rows)
    assert {(row["dims"]["rows"], row["dims"]["order"]) for row in rows} == {(392, 27)}


def test_precondition_benchmark_shares_inverses_and_all_rivals_are_right():
    import bench_precondition
    from harness.case import Plan
    from harness.measure import check

    plan = Plan(
        torch.device("cpu"), quick=True, shapes=("mlp-fashion", "minilm-lora"), compile=False
    )
    cases = {case.shape: case for case in bench_precondition.cases(plan)}
    assert {"mlp-fashion bias", "minilm-lora dot"} < set(cases)
    for case in cases.values():
        for contender in case.contenders:
            error, problem = check(case, contender)
            assert problem is None and error < 5e-6, (case.shape, contender.name)
    lora, mlp = cases["minilm-lora"], cases["mlp-fashion bias"]
    assert (lora.dims["weights"], lora.dims["right_inverses"]) == (24, 18)
    assert (mlp.dims["weights"], mlp.dims["right_inverses"]) == (3, 3)
    assert "matmul, shared joined" in {c.name for c in lora.contenders}


@pytest.mark.parametrize(
    ("shapes", "backend"),
    [
        ([(16, 768), (768, 8)] * 2, "cpu"),
        ([(256, 785), *[(10, 257)] * 4], "cpu+reference"),
        ([(256, 785), (10, 257)], "reference"),
        ([(17, 17)], "reference"),
    ],
)
def test_precondition_benchmark_names_what_serves_its_items(shapes, backend):
    import bench_precondition

    import grng_kernels

    if not grng_kernels.backends()["cpu"].available:
        pytest.skip("the extension is not built")
    assert bench_precondition._backend(shapes, torch.device("cpu")) == (backend, ())


def test_extra_memory_is_that_of_the_call_and_not_of_its_arguments():
    code = (
        "import torch; from harness.memory import extra_bytes; a = torch.ones(1 << 21); a + 1;"
        "print(extra_bytes(lambda: (a + 1) * 2, a.device), extra_bytes(lambda: a.add_(1), a.device))"
    )
    done = command("-c", code, PYTHONPATH=os.pathsep.join([str(BENCHMARKS), *sys.path]))
    assert done.returncode == 0, done.stderr
    two_copies, none = map(int, done.stdout.split())
    # What the allocator holds already may serve one of the copies.
    assert 7e6 < two_copies < 18e6
    assert none < 1e6


def test_run_names_the_benchmarks_it_knows():
    done = command(BENCHMARKS / "run.py", "--only", "nothing")
    assert done.returncode == 2
    assert "--only must be of kron_factor" in done.stderr


def test_campaign_says_in_one_line_that_there_is_no_gpu():
    # With no device visible the answer is the same on a machine that has one.
    done = command(BENCHMARKS / "campaign.py", CUDA_VISIBLE_DEVICES="-1")
    assert done.returncode == 3
    assert done.stdout.count("\n") == 1
    assert "nothing was run" in done.stdout
    assert not done.stderr


def test_campaign_dry_run_fits_into_nine_minutes():
    import campaign

    assert sum(stage.budget_s for stage in campaign.STAGES) <= campaign.TOTAL_S == 540
    done = command(BENCHMARKS / "campaign.py", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert all(stage.name in done.stdout for stage in campaign.STAGES)


def test_campaign_reports_stages_that_fail_overrun_or_cannot_run(tmp_path, monkeypatch):
    import campaign

    monkeypatch.setattr(campaign, "GRACE_S", 1.0)
    monkeypatch.setattr(campaign, "LEAST_S", 1.0)

    def python(code):
        return lambda context: [sys.executable, "-c", code]

    def broken(context):
        raise OSError("no such tool")

    stages = [
        campaign.Stage("fine", 20, python("print('all well')")),
        campaign.Stage("bad", 20, python("print('boom'); raise SystemExit(7)")),
        campaign.Stage(
            "slow", 5, python("import time; print('begun', flush=True); time.sleep(60)")
        ),
        campaign.Stage("absent", 20, lambda context: "no tool here"),
        campaign.Stage("broken", 20, broken),
    ]
    context = campaign.Context(tmp_path, (9, 0))
    outcomes = [campaign.run_stage(stage, context, 60.0, tmp_path) for stage in stages]
    assert [o.status for o in outcomes] == ["ok", "failed (7)", "overran", "skipped", "failed"]
    assert [o.detail for o in outcomes] == [
        "all well",
        "boom",
        "begun",
        "no tool here",
        "no such tool",
    ]
    late = campaign.run_stage(stages[0], context, 1.5, tmp_path)
    assert late.status == "no time"
    assert "overran" in campaign.stage_table(outcomes)


def test_correctness_sweep_passes_on_the_kernels_of_this_cpu():
    import gpu_correctness

    import grng_kernels

    if not grng_kernels.backends()["cpu"].available:
        pytest.skip("the extension is not built")
    verdicts, _ = gpu_correctness.sweep(
        torch.device("cpu"),
        math.inf,
        factors=[(1, 1), (17, 65)],
        together=[(17, 300), (65, 0), (400, 90)],
        images=[(2, 3, 9, 8), (2, 20, 7, 7), (0, 4, 5, 5)],
        inverses=[(1, 16, 17, 40), (65, 130)],
        outputs=[1, 9],
    )
    assert len(verdicts) == 2 * 3 + 6 + 3 + 6 + 12 + 6 + 3 * 3 + 3 * 6 + 2 * 3 + 3
    assert [v for v in verdicts if not v.passed] == []


@pytest.mark.parametrize("fault", ["wrong", "one item"])
def test_correctness_sweep_sees_a_wrong_list(monkeypatch, fault):
    import gpu_correctness

    import grng_kernels

    if not grng_kernels.backends()["cpu"].available:
        pytest.skip("the extension is not built")

    def spoiled(call):
        def run(first, *args, **options):
            result = call(first, *args, **options)
            outs = result[0] if isinstance(result, tuple) else first
            if isinstance(outs, list) and (fault == "wrong" or len(outs) == 2):
                outs[-1].mul_(1 + 1e-4)
            return result

        return run

    for name in ("kron_factor_update_", "kron_factor_conv2d_update_", "precondition"):
        monkeypatch.setattr(gpu_correctness, name, spoiled(getattr(gpu_correctness, name)))
    verdicts, _ = gpu_correctness.sweep(
        torch.device("cpu"),
        math.inf,
        factors=[],
        together=[(3, 20), (17, 40)],
        images=[(1, 2, 5, 5), (2, 1, 4, 4)],
        weights=[(3, 20), (20, 3)],
        inverses=[],
        outputs=[],
    )
    lists = [v for v in verdicts if "NaN" not in v.name and "every" not in v.name]
    lists = [v for v in lists if "list" in v.name or "conv2d" in v.name]
    assert len(lists) == 6 + 12 + 6
    assert not any(v.passed for v in lists)


def test_correctness_sweep_runs_in_the_interpreter():
    """The checks of the Triton kernels, of which nothing else runs before there is a GPU."""
    from tests.ops.test_interpreter import problem

    if problem() is not None:
        pytest.skip(problem())
    code = (
        "import sys, math, torch; sys.path.insert(0, 'benchmarks'); import gpu_correctness as g\n"
        "g._factor_checks = lambda *a: iter(())\n"
        "g.DTYPES, g.CONVOLUTIONS = g.DTYPES[::2], g.CONVOLUTIONS[:2]\n"
        "v, out = g.sweep(torch.device('cpu'), math.inf, together=[(3, 0), (5, 9)], "
        "images=[(1, 1, 4, 4), (1, 2, 3, 3)], weights=[(3, 5), (5, 3)], inverses=[], outputs=[2])\n"
        "assert len(v) == 4 + 6 + 4 + 3 + 6 + 2 * 6, (len(v), out)\n"
        "assert all(x.passed for x in v), [x for x in v if not x.passed]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_prediction_is_reproduced_exactly():
    pytest.importorskip("triton")
    import predict

    assert predict.report() == predict.report()
    assert predict.main(["--check"]) == 0, "run: python benchmarks/predict.py --write"
    text = predict.TARGET.read_text()
    for kernel in (
        "gram_partial_kernel",
        "gram_reduce_kernel",
        "apply_kernel<true>",
        "apply_kernel<false>",
        "damped_inverse_small_kernel<false>",
        "damped_inverse_small_kernel<true>",
        "_gram_narrow_kernel",
        "_gram_wide_kernel",
        "_apply_narrow_kernel",
        "_apply_wide_kernel",
    ):
        assert kernel in text
    assert text.count("never run on a GPU |") == len(list(predict.works()))


def test_method_table_of_damped_inverse_follows_the_model():
    """Wherever the table says Newton-Schulz the model says so too, and not for eight times as many."""
    pytest.importorskip("triton")
    from prediction.damped_inverse_large import large_inverse_us

    from grng_kernels.damped_inverse.method_table import COUNTS, SMALLEST_RHO, faster

    for n, count in COUNTS:
        for rho in (1e-1, 1e-2, SMALLEST_RHO):
            assert faster(n, count, rho) == "newton_schulz"
            for many, sign in ((count, 1), (8 * count, -1)):
                times = [
                    large_inverse_us(method, many, n, rho, graph=True)
                    for method in ("direct", "newton_schulz")
                ]
                assert sign * (times[0] - times[1]) > 0, (n, many, rho, times)

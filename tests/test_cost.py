"""What Eva may cost at most: figures of compilers, the same on every machine, as ratios to SGD with momentum."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import baselines
import cost
import cost_report
from measure import Figures, Times, compile_step, names, time_in_turn
from models import CASES, Case, bottlenecks, gpt, mlp
from steps import OPTIMIZERS, training_step, update_alone

import eva_optax
from eva_optax._contraction import Contraction
from eva_optax._convolution import Convolution

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

# As large as it takes for the layers to outweigh what is done once for each of them.
MODELS = {
    "mlp": lambda: mlp(1024, 1024),
    "decoder, scanned and rematerialised": lambda: gpt(8, 512, 512, 2, 8, 2048, scan=True),
    "ResNet bottlenecks": lambda: bottlenecks(16, 28, 1, 128),
}


def figures(case: Case, optimizer: str, layout: str):
    mesh = Mesh(np.array(jax.devices()).reshape(8, 1), ("data", "model"))
    return compile_step(training_step(case, OPTIMIZERS[optimizer], mesh, layout))[1]


@pytest.mark.parametrize("model", MODELS)
def test_a_data_parallel_step_costs_what_one_of_sgd_costs(model):
    sgd, eva = (figures(MODELS[model](), optimizer, "data") for optimizer in ("sgd", "eva+sgd"))
    assert eva.flops <= 1.02 * sgd.flops
    assert eva.argument_bytes <= 1.01 * sgd.argument_bytes
    assert eva.collective_bytes <= 1.01 * sgd.collective_bytes
    assert eva.collectives <= sgd.collectives
    assert sgd.collective_bytes > 0


@pytest.mark.parametrize("scan", [False, True])
def test_a_is_computed_once_for_each_layer_also_under_remat(scan, monkeypatch):
    mean = Contraction.mean_input
    # A function that nothing else in a program calls marks each computation of a.
    monkeypatch.setattr(Contraction, "mean_input", lambda self, x: jax.lax.lgamma(mean(self, x)))
    case = gpt(8, 32, 32, 2, 2, 64, scan=scan)
    text = training_step(case, OPTIMIZERS["eva+sgd"]).lower().as_text()
    layers = 6
    assert text.count("chlo.lgamma") == (layers if scan else 2 * layers)


@pytest.mark.parametrize(("window", "stride", "padding"), [(16, 16, "VALID"), (3, 2, "SAME"), (7, 2, ((3, 3), (3, 3)))])
def test_the_mean_patch_of_a_strided_window_takes_about_one_pass(window, stride, padding):
    x = jax.ShapeDtypeStruct((2, 64, 64, 3), "float32")
    layer = Convolution((window, window, 3, 4), (stride, stride), padding, (1, 1), (1, 1), 1)
    flops = jax.jit(layer.mean_input).lower(x).compile().cost_analysis()["flops"]
    assert flops <= 1.6 * x.size  # a sum for each offset by itself takes 9 to 60


def test_the_forward_pass_is_that_of_the_untapped_model():
    case = mlp(64, 64)
    variables = jax.eval_shape(eva_optax.tap(case.model).init, jax.random.key(0), case.inputs)

    def text(model, params):
        return jax.jit(lambda params, x: model.apply({"params": params}, x)).lower(params, case.inputs).as_text()

    plain = eva_optax.strip(variables["params"])
    tapped = text(eva_optax.tap(case.model), variables["params"])
    assert tapped.count("stablehlo.") == text(case.model, plain).count("stablehlo.")


def test_steps_are_timed_in_turn():
    step = training_step(CASES["mlp"]["tiny"](1), OPTIMIZERS["sgd"])
    compiled, _ = compile_step(step)
    times = time_in_turn({"one": (compiled, step), "same": (compiled, step)}, repetitions=3)
    assert times["one"].time_ratio == 1
    assert 0 < times["same"].ms_low <= times["same"].ms <= times["same"].ms_high


def test_the_update_alone_takes_its_arguments_apart():
    step = update_alone({"one": (4, 8)}, OPTIMIZERS["eva+sgd"], stacked=3)
    params, _ = jax.jit(step.function)(*step.make())
    assert params["one"]["kernel"].shape == (3, 4, 8)
    assert bool(np.isfinite(params["one"]["kernel"]).all())


def run_benchmark(folder: Path, *arguments: str) -> dict[tuple[str, ...], dict[str, str]]:
    """What one run of the program writes, by device, case, layout, prefetching and optimizer."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(BENCHMARKS.parent)
    command = [sys.executable, str(BENCHMARKS / "cost.py"), *arguments, "--results", str(folder)]
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    rows = {}
    for path in folder.glob("cost_*.csv"):
        with path.open() as file:
            keys = ("device", "case", "layout", "prefetch", "optimizer")
            rows |= {tuple(row[key] for key in keys): row for row in csv.DictReader(file)}
    return rows


def test_the_program_measures_only_what_is_missing(tmp_path):
    arguments = ("--target", "cpu", "--size", "tiny", "--cases", "mlp", "--repetitions", "2", "--devices", "1 device")
    first = run_benchmark(tmp_path, *arguments, "--optimizers", "eva")
    assert [key[-1] for key in first] == ["sgd", "eva"]
    assert float(first["1 device", "mlp", "single", "yes", "sgd"]["time_ratio"]) == 1
    assert run_benchmark(tmp_path, *arguments, "--optimizers", "eva") == first
    assert "tiny" in next(tmp_path.glob("cost_cpu*.csv")).name


# Bars for a v5e, as ratios to SGD with momentum: figure, case, layout, at most.
BARS = [
    ("hbm_bytes", "update", "single", 1.21),
    ("hbm_bytes", "update-stacked", "single", 1.21),
    ("hbm_bytes", "mlp", "single", 1.25),  # the gradient goes to memory and back, and nothing else
    ("hbm_bytes", "gpt-1", "data", 1.01),
    ("bytes_accessed", "gpt-1", "data", 1.02),
    ("collective_bytes", "gpt-1", "data", 1.005),
    ("hbm_bytes", "bottlenecks", "data", 1.05),
    ("collective_bytes", "bottlenecks", "data", 1.05),
    ("collective_bytes", "mlp", "data", 1.005),
    ("collective_bytes", "mlp", "fsdp", 1.005),
    ("collective_bytes", "mlp", "tensor", 1.015),
]


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu")
def test_a_tpu_compiler_sees_no_more_than_the_bars(tmp_path):
    arguments = ("--target", "tpu", "--devices", "v5e:2x2", "--optimizers", "eva+sgd", "--prefetch", "no")
    rows = {}
    for case, layout in sorted({bar[1:3] for bar in BARS}):
        rows = run_benchmark(tmp_path, *arguments, "--cases", case, "--layouts", layout)
    for figure, case, layout, most in BARS:
        sgd, eva = (float(rows["v5e:2x2", case, layout, "no", name][figure]) for name in ("sgd", "eva+sgd"))
        assert eva <= most * sgd, (figure, case, layout, eva / sgd)


@pytest.mark.gpu_aot
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason='needs "jax[cuda12]"')
def test_a_gpu_compiler_reads_the_gradient_twice(tmp_path):
    arguments = ("--target", "h100", "--cases", "update", "update-stacked", "--optimizers", "eva+sgd", "eva")
    rows = run_benchmark(tmp_path, *arguments, "--devices", "1 GPU")
    for case in ("update", "update-stacked"):
        sgd, *others = (
            float(rows["1 GPU", case, "single", "yes", name]["hbm_bytes"]) for name in ("sgd", "eva+sgd", "eva")
        )
        assert max(others) <= 1.21 * sgd, case


def results_row(case: str, layout: str, optimizer: str, hbm: float) -> dict[str, str]:
    row = dict.fromkeys((*names(Times), *names(Figures)), "")
    row |= {"hbm_bytes": str(hbm), "peak_bytes": "1e6", "collectives": "0"}
    return row | dict(zip(cost.KEYS, ("v5e:2x2", case, layout, "no", optimizer), strict=True)) | {"version": "any"}


@pytest.mark.parametrize(("passes", "verdict"), [(6.02, "reached"), (7, "missed")])
def test_the_report_compares_with_sgd_and_says_what_was_missed(passes, verdict, tmp_path, monkeypatch):
    monkeypatch.setattr(cost_report, "DOCS", tmp_path)
    page = tmp_path / "cost.md"
    page.write_text(f"before\n{cost_report.BEGIN}\nold\n{cost_report.END}\nafter\n")
    rows = [results_row("update", "single", "sgd", 5e6), results_row("update", "single", "eva+sgd", passes * 1e6)]
    cost.write_rows(tmp_path / "cost_tpu.csv", [*rows, results_row("mlp", "data", "eva+sgd", 1)])
    for _ in range(2):
        cost_report.write_report(tmp_path)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert f"| ≤ 1.21 | {passes / 5:.4f} | {verdict} |" in text
    assert f"| v5e:2x2 | update | single | 5 MB | {passes / 5:.4f} |" in text
    assert "old" not in text
    assert "mlp" not in text  # nothing to compare it with
    assert (tmp_path / "cost.png").stat().st_size > 1000


@pytest.mark.parametrize(("option", "message"), [("--cases", "no case 'nothing'"), ("--optimizers", "no optimizer")])
def test_unknown_names_are_refused(option, message):
    with pytest.raises(SystemExit, match=message):
        cost.chosen_plans(cost.parse_arguments([option, "nothing"]))


def test_a_gpu_is_asked_for_where_there_is_none():
    if jax.default_backend() == "gpu":
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="--target gpu needs a GPU"):
        cost.devices_of("1 device", "gpu")


@pytest.mark.parametrize(("target", "advice"), [("tpu", "pip install libtpu"), ("h100", "pip install 'jax.cuda12.'")])
def test_a_missing_compiler_is_asked_for(target, advice, monkeypatch):
    monkeypatch.setattr(cost, "find_spec", lambda package: None)
    with pytest.raises(SystemExit, match=f"--target {target} needs .*: {advice}"):
        cost.prepare_environment(target, None)


def test_baselines_run_on_a_cpu_only(capsys):
    with pytest.raises(SystemExit):
        cost.parse_arguments(["--target", "tpu", "--baselines"])
    assert "--baselines run on a CPU only, got --target tpu" in capsys.readouterr().err


def test_options_narrow_and_widen_what_is_planned():
    options = cost.parse_arguments(
        ["--target", "tpu", "--devices", "v5p:4x4x4", "--cases", "vit", "update", "--optimizers", "eva"]
    )
    wanted = [("v5p:4x4x4", "vit", ("data",)), ("v5p:4x4x4", "update", ("single",))]
    plans = cost.chosen_plans(options)
    assert [(plan.device, plan.case, plan.layouts) for plan in plans] == wanted
    assert {plan.optimizers for plan in plans} == {("sgd", "eva")}


def test_a_baseline_that_cannot_run_says_what_it_needs():
    with pytest.raises(SystemExit, match=r"kfac-jax==0\.0\.8, jax==0\.7\.2"):
        baselines._run("kfac", [sys.executable, "-c", "raise ImportError"])

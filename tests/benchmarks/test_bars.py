"""What Eva may cost at most: figures of compilers and counts, the same on every machine, against the bars."""

import csv
import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common.results import ROOT, read_rows
from benchmarks.cost.bars import BARS, OVERHEAD_BARS, Bar
from benchmarks.cost.cases import make_case
from benchmarks.cost.measure import compile_step
from benchmarks.cost.overhead import overhead
from benchmarks.cost.plans import KEYS
from benchmarks.cost.steps import make_step


def run_benchmark(folder: Path, *arguments: str) -> dict[tuple[str, ...], dict[str, str]]:
    """What one run of the program writes, by device, case, layout, prefetching and optimizer."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "benchmarks.cost", *arguments, "--results", str(folder)]
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=ROOT)
    return {key: row for path in folder.glob("cost_*.csv") for key, row in read_rows(path, KEYS).items()}


@pytest.mark.parametrize(
    "group", sorted({bar.group for bar in BARS if bar.target == "cpu"}), ids=lambda group: "-".join(group[1:3])
)
def test_a_step_on_eight_devices_costs_what_one_of_sgd_costs(group):
    rows = {}
    for optimizer in ("sgd", "eva+sgd"):
        rows[*group, optimizer] = compile_step(make_step((*group, optimizer), "cpu"))[1]
    for bar in BARS:
        if bar.group == group:
            value = bar.value(rows)
            assert value is not None
            assert value <= bar.most, (bar.what, value)


@pytest.fixture(scope="module", params=["eva+sgd", "eva_adamw"])
def added(request):
    """What an optimizer adds to a step, for each layer of an MLP."""
    return request.param, overhead(make_case("mlp-20"), request.param, None, repetitions=0)


@pytest.mark.parametrize("figure", ["gradient", "update", "arrays", "entry"])
def test_what_is_added_to_a_step_stays_below_the_bars(figure, added):
    optimizer, found = added
    for bar in OVERHEAD_BARS:
        if (bar.figure, bar.optimizer) == (figure, optimizer):
            assert found[figure] <= (bar.held or bar.most), (bar.what, found[figure])


def check(bars: list[Bar], folder: Path) -> None:
    """Compiles what the bars need, and compares."""
    rows = {}
    for group in sorted({bar.group for bar in bars}):
        here = [bar for bar in bars if bar.group == group]
        optimizers = {name for bar in here for name in (bar.optimizer, bar.beyond) if name}
        rows |= run_benchmark(folder, "--target", here[0].target, "--only", *group, *sorted(optimizers))
    for bar in bars:
        value = bar.value(rows)
        assert value is not None, bar.what
        assert value <= bar.most, (bar.what, value)


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu")
@pytest.mark.parametrize("case", sorted({bar.case for bar in BARS if bar.target == "tpu"}))
def test_a_tpu_compiler_sees_no_more_than_the_bars(case, tmp_path):
    check([bar for bar in BARS if (bar.target, bar.case) == ("tpu", case) and bar.possible], tmp_path)


@pytest.mark.gpu_aot
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason='needs "jax[cuda12]"')
@pytest.mark.parametrize("case", sorted({bar.case for bar in BARS if bar.target == "h100"}))
def test_a_gpu_compiler_sees_no_more_than_the_bars(case, tmp_path):
    check([bar for bar in BARS if (bar.target, bar.case) == ("h100", case)], tmp_path)


@pytest.mark.gpu_aot
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason='needs "jax[cuda12]"')
def test_a_gpu_runs_few_kernels_more_for_each_layer(tmp_path):
    bars = [bar for bar in OVERHEAD_BARS if bar.target == "h100"]
    optimizers = {bar.optimizer for bar in bars}
    run_benchmark(tmp_path, "--target", "h100", "--overhead", "--only", "mlp-20", *optimizers)
    rows = read_rows(tmp_path / "overhead_h100.csv", ("case", "optimizer"))
    for bar in bars:
        assert float(rows["mlp-20", bar.optimizer][bar.figure]) <= bar.most, bar.what


def results(optimizers: dict[str, float], bar: Bar) -> dict:
    return {(*bar.group, name): {bar.figure: str(value)} for name, value in optimizers.items()}


def test_a_bar_is_a_ratio_to_sgd_or_one_less_another():
    alone, beyond = Bar("", "flops", 1.5, "mlp"), Bar("", "flops", -0.25, "mlp", beyond="adamw")
    assert alone.value(results({"sgd": 4, "eva+sgd": 6}, alone)) == 1.5
    assert beyond.value(results({"sgd": 4, "eva+sgd": 5, "adamw": 6}, beyond)) == -0.25
    assert alone.value(results({"sgd": 4}, alone)) is None
    assert beyond.value(results({"sgd": 4, "eva+sgd": 5}, beyond)) is None
    assert alone.value(results({"sgd": 0, "eva+sgd": 5}, alone)) is None


def test_every_bar_was_measured_at_least_once():
    """No bar names a row that no run of the benchmark writes."""
    for target, bars in itertools.groupby(BARS, key=lambda bar: bar.target):
        rows = read_rows(ROOT / "benchmarks" / "results" / f"cost_{target}.csv", KEYS)
        assert [bar.what for bar in bars if bar.value(rows) is None] == []


@pytest.mark.slow
def test_the_program_measures_only_what_is_missing(tmp_path):
    first = run_benchmark(tmp_path, "--only", "1 device", "vit", "eva")
    assert [key[-1] for key in first] == ["sgd", "eva"]
    assert float(first["1 device", "vit", "single", "yes", "sgd"]["time_ratio"]) == 1
    assert run_benchmark(tmp_path, "--only", "1 device", "vit", "eva") == first  # times included
    more = run_benchmark(tmp_path, "--only", "1 device", "vit", "eva_f+sgd")
    assert more.keys() - first.keys() == {("1 device", "vit", "single", "yes", "eva_f+sgd")}
    with next(tmp_path.glob("cost_cpu.csv")).open() as file:
        assert len(list(csv.DictReader(file))) == 3

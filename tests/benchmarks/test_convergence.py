"""The convergence benchmark: its grid of rates, its records, its figures, and one run of every optimizer."""

import math

import jax
import numpy as np
import pytest

from benchmarks.convergence import report, training, tuning
from benchmarks.convergence.optimizers import OPTIMIZERS, muon_dimensions
from benchmarks.convergence.records import Key, Records
from benchmarks.convergence.tasks import TASKS, Perceptron, Task, diabetes, mean_squared_error
from benchmarks.convergence.training import Run

MODEL = Perceptron(())
TINY = Task("diabetes", MODEL, mean_squared_error, diabetes, 4, 16, (0.1, 0.01, 0.01))


@pytest.mark.parametrize(("optimum", "tried"), [(1.0, 6), (1e3, 14), (1e-3, 13), (1e9, 14), (1e-9, 14)])
def test_the_grid_grows_until_the_best_rate_is_inside(optimum, tried):
    losses = {}
    best = tuning.tune(losses, 1.0, lambda rate: abs(math.log(rate / optimum)), extensions=8)
    assert len(losses) == tried
    assert best == min(losses, key=lambda rate: abs(math.log(rate / optimum)))
    assert (min(losses) < best < max(losses)) == (1e-9 < optimum < 1e9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_rate_that_diverges_is_never_the_best(bad):
    losses = {}
    best = tuning.tune(losses, 1.0, lambda rate: bad if rate > 0.5 else 1 / rate, extensions=8)
    assert best == max(rate for rate in losses if rate <= 0.5)


def test_steps_to_a_loss_are_interpolated():
    run = Run(40, [8.0, 4.0, 5.0, 1.0], [9.0, 7.0])
    wanted = {9.0: 10, 8.0: 10, 6.0: 15, 4.0: 20, 3.0: 35, 1.0: 40, 0.9: math.inf}
    assert {loss: run.steps_to(loss) for loss in wanted} == wanted
    assert run.steps_to_validation(8.0) == 30
    assert Run(40, [math.inf] * 4, [math.inf] * 4).steps_to(1.0) == math.inf


def test_a_loss_is_interpolated_between_evaluations():
    run = Run(40, [8.0, 4.0, 5.0, 1.0], [0.0])
    assert [run.loss_at(steps) for steps in (5, 10, 15, 35, 40, 90)] == [8.0, 8.0, 6.0, 3.0, 1.0, 1.0]


def test_what_is_on_record_is_not_repeated(tmp_path, monkeypatch):
    calls = []

    def fake(task, optimizer, rate, seed, steps):
        calls.append((rate, seed))
        return Run(steps, [2.0, math.inf if rate > 0.3 else 1 + abs(math.log(rate / 0.1))], [3.0])

    monkeypatch.setattr(tuning, "train", fake)
    for attempt in range(2):
        records = Records(tmp_path)
        tuning.measure(records, TINY, OPTIMIZERS["sgd"], 4, 8)
        assert len(calls) == 9, attempt
    assert sorted(calls)[-1][0] > 0.3  # an infinite loss was written and read, too
    assert [seed for rate, seed in calls if rate == 0.1] == [0, 1, 2, 3]

    path = tmp_path / "convergence.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))  # interrupted before the last run
    tuning.measure(Records(tmp_path), TINY, OPTIMIZERS["sgd"], 4, 8)
    assert len(calls) == 10
    assert calls[-1] == (0.1, 3)

    calls.clear()
    tuning.measure(Records(tmp_path), TINY, OPTIMIZERS["adamw"], 4, 8)
    assert [seed for _, seed in calls if seed] == [1, 2, 3, 4, 5]


def test_the_schedule_warms_up_and_ends_at_zero():
    rates = [float(training.schedule(np.float32(2.0), np.float32(100.0))(count)) for count in range(101)]
    np.testing.assert_allclose(rates[0], 0.4, rtol=1e-6)
    np.testing.assert_allclose(rates[100], 0, atol=1e-7)
    assert max(rates) == rates[4]
    np.testing.assert_allclose(rates[50], 1.0, rtol=1e-5)


def test_figures_are_against_the_baseline_on_the_same_seed(tmp_path):
    records = Records(tmp_path)
    for seed, end in ((1, 1.0), (2, 2.0), (3, 3.0)):
        records.add_run(Key("cnn", "sgd", "test", "0.1", seed), Run(40, [9.0, 8.0, 7.0, end], [9.0, 3.0, 3.5, 4.0]))
        records.add_run(Key("cnn", "eva", "test", "0.2", seed), Run(40, [9.0, end, end / 2, end / 4], [2, 2, 2, 5.0]))
        records.add_run(Key("cnn", "eva_f", "test", "0.2", seed), Run(40, [9.0, 9.0, 9.0, 9.0], [4.0] * 4))
        records.add_run(Key("cnn", "eva_s", "test", "0.2", seed), Run(40, [9.0, 9.0, 9.0, 9.0], [4.0]))
    # It says nothing that the baseline diverged:
    records.add_run(Key("cnn", "sgd", "test", "0.1", 4), Run(40, [math.inf] * 4, [math.inf] * 4))
    records.add_run(Key("cnn", "eva", "test", "0.2", 4), Run(40, [1.0] * 4, [5.0] * 4))
    records.add_time("cnn", "sgd", 0.01, 0.01)
    records.add_time("cnn", "eva", 0.02, 0.01)
    found = report.summaries(Records(tmp_path))
    eva = found["cnn", "eva"]
    assert (eva.steps, eva.fewer_steps, eva.less_time) == ([20.0] * 3, 2.0, 1.0)
    assert (eva.lower_train, eva.lower_validation) == (4.0, 0.8)
    assert (eva.best_validation, eva.fewer_to_validation) == (2.0, 2.0)
    assert eva.same_time == 1.5  # after 20 steps, which take as long as 40 of the baseline
    assert found["cnn", "sgd"].fewer_steps == 1.0
    assert found["cnn", "eva_f"].fewer_steps == 0.0
    assert found["cnn", "eva"].row("eva")[-2:] == ("20 (20–20), 2.00×", "0.4, 1.00×")
    assert [eva.row("eva")[column] for column in (3, 5)] == ["1.5", "2, 2.00×"]
    assert [found["cnn", name].row(name)[5] for name in ("eva_f", "eva_s")] == ["4, –", ""]
    assert found["cnn", "eva_f"].row("eva_f")[-2:] == ("–", "–")

    page = tmp_path / "convergence.md"
    report.write(Records(tmp_path), tmp_path)
    text = page.read_text()
    assert text.count("| eva |") == 1
    for name in report.figures.PANELS:
        assert (tmp_path / f"convergence_{name}.png").stat().st_size > 10_000


def test_the_poisson_task_has_the_laplacian_of_its_network():
    model, data = TASKS["poisson"].model, TASKS["poisson"].load().train
    points = data.inputs[:5]
    params = model.init(jax.random.key(0), points)["params"]

    def u(x):
        return np.prod(x * (1 - x)) * Perceptron(model.widths).apply({"params": params["Perceptron_0"]}, x)

    wanted = [-jax.hessian(u)(x).trace() for x in jax.numpy.asarray(points)]
    np.testing.assert_allclose(model.apply({"params": params}, points), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        data.targets[:5],
        [-jax.hessian(lambda x: jax.numpy.sin(np.pi * x).prod())(x).trace() for x in points],
        rtol=1e-4,
    )


@pytest.mark.parametrize("name", ["cnn", "lm_200", "resnet", "mixer", "decoder_1000"])
def test_the_baseline_muon_orthogonalises_every_kernel(name):
    task = TASKS[name]
    params = jax.eval_shape(task.model.init, jax.random.key(0), task.load().train.inputs[:1])["params"]
    specs = jax.tree.leaves(muon_dimensions(params), is_leaf=lambda leaf: not isinstance(leaf, dict))
    for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(params), specs, strict=True):
        if path[-1].key == "kernel" and path[0].key != "head":
            axes = {*np.atleast_1d(spec.reduction_axis), spec.output_axis}
            assert axes == set(range(leaf.ndim)) - ({0} if "layers" in str(path) else set())
            assert spec.output_axis == leaf.ndim - 1
        else:
            assert spec is None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains(name):
    run = training.train(TINY, OPTIMIZERS[name], 0.01, seed=1, steps=30)
    assert len(run.curve) == training.POINTS
    assert len(run.validation) == training.POINTS
    assert math.isfinite(run.validation[-1])
    assert run.final < run.curve[0]


@pytest.mark.parametrize("name", ["resnet", "mixer", "decoder_1000"])
def test_every_kind_of_model_learns(name):
    """Two steps of SGD: in the first, what a BatchNorm of scale 0 follows has no gradient yet."""
    task, sgd = TASKS[name], OPTIMIZERS["sgd"]
    step = training.train_step(task.model, task.loss, sgd)
    carry = training.start(task, sgd, seed=1)
    before = jax.tree.map(np.asarray, carry[0])
    for indices in task.batches(1, 2)[:, :8]:
        batch = (part[indices] for part in task.load().train)
        carry = step(carry, np.float32(0.01), np.float32(20), *batch)
    moved = jax.tree.map(lambda old, new: np.isfinite(new).all() and (old != new).any(), before, carry[0])
    assert [path for path, leaf in jax.tree_util.tree_leaves_with_path(moved) if not leaf] == []

"""What steps are compiled and timed, and how the program is told which; that taps repeat no work of the model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eva_optax
from benchmarks.common.models import Kernels
from benchmarks.common.results import publish
from benchmarks.common.timing import Carrying, in_turn
from benchmarks.cost import __main__ as program
from benchmarks.cost import measure, plans, report, targets
from benchmarks.cost.cases import mlp
from benchmarks.cost.overhead import tapped_layers
from benchmarks.cost.steps import OPTIMIZERS, update_alone


class Blocks(nn.Module):
    """Dense layers, each rematerialised by itself or not."""

    remat: bool

    @nn.compact
    def __call__(self, x):
        for layer in range(3):
            dense = nn.remat(nn.Dense) if self.remat else nn.Dense
            x = nn.tanh(dense(64, name=f"dense_{layer}")(x))
        return x


def gradient_flops(model: nn.Module, x: jax.ShapeDtypeStruct, optimized: bool) -> float:
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    lowered = jax.jit(jax.grad(lambda params, x: (model.apply(params, x) ** 2).mean())).lower(params, x)
    return (lowered.compile() if optimized else lowered).cost_analysis()["flops"]


def test_a_is_computed_once_for_each_layer_also_under_remat():
    x = jax.ShapeDtypeStruct((512, 64), "float32")

    def added(remat):
        # As JAX hands it to the compiler: that one might find what is computed twice.
        flops = [gradient_flops(model, x, optimized=False) for model in (eva_optax.tap(Blocks(remat)), Blocks(remat))]
        return flops[0] - flops[1]

    assert added(remat=True) - added(remat=False) < 0.5 * x.size  # a once more takes 1 for each layer


@pytest.mark.parametrize(("window", "stride", "padding"), [(16, 16, "VALID"), (3, 2, "SAME"), (7, 2, ((3, 3), (3, 3)))])
def test_the_mean_patch_of_a_strided_window_takes_about_one_pass(window, stride, padding):
    x = jax.ShapeDtypeStruct((2, 64, 64, 3), "float32")
    model = nn.Conv(4, (window, window), stride, padding=padding)
    tapped, untapped = (gradient_flops(one, x, optimized=True) for one in (eva_optax.tap(model), model))
    outputs = jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0].size
    # b and the sums that recognise noise pass over the outputs; a sum for each offset by itself takes 9 to 60.
    assert tapped - untapped <= 1.6 * x.size + 4 * outputs


def test_the_forward_pass_is_that_of_the_untapped_model():
    case = mlp(8, 64)
    variables = jax.eval_shape(eva_optax.tap(case.model).init, jax.random.key(0), case.inputs)

    def text(model, params):
        return jax.jit(lambda params, x: model.apply({"params": params}, x)).lower(params, case.inputs).as_text()

    plain = eva_optax.strip(variables["params"])
    tapped = text(eva_optax.tap(case.model), variables["params"])
    assert tapped.count("stablehlo.") == text(case.model, plain).count("stablehlo.")


def test_steps_are_timed_in_turn():
    """All steps of a round before the next round, in orders that differ; rounds that warm up are not timed."""
    calls = []

    def step(name):
        calls.append(name)
        return jnp.zeros(())

    seconds = in_turn({name: lambda name=name: step(name) for name in "abc"}, rounds=8, warm_up=2)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 8, "b": 8, "c": 8}
    rounds = ["".join(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert len(rounds) == 10
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert len(set(rounds)) > 2


def test_times_are_medians_of_rounds_and_ratios_to_the_first_step(monkeypatch):
    rounds = {"sgd": [0.001, 0.002, 0.004], "eva": [0.002, 0.003, 0.012]}
    monkeypatch.setattr(measure, "in_turn", lambda steps, count: rounds)
    step = update_alone(Kernels((("one", 4, 8),)), OPTIMIZERS["sgd"])
    times = measure.time_in_turn(dict.fromkeys(rounds, (step.function, step)))
    assert times["sgd"] == {"ms": 2.0, "time_ratio": 1.0}
    assert (times["eva"]["ms"], times["eva"]["time_ratio"]) == (3.0, 2.0)


def test_a_step_goes_on_from_what_it_returned():
    step = Carrying(lambda count, factor: (count * factor,), (1,), 3)
    assert [step(), step(), step()] == [(3,), (9,), (27,)]


@pytest.mark.parametrize("stacked", [0, 3])
def test_the_update_alone_takes_kernels_and_probes(stacked):
    step = update_alone(Kernels((("one", 4, 8),), stacked), OPTIMIZERS["eva+sgd"])
    params, state, grads = step.make()
    new, _ = jax.jit(step.function)(params, state, grads)
    lead = (stacked,) if stacked else ()
    assert new["one"]["kernel"].shape == (*lead, 4, 8)
    moved = new["one"]["kernel"] - params["one"]["kernel"]
    assert bool(np.isfinite(moved).all())
    assert bool((moved != 0).any())
    assert tapped_layers(params) == (1, stacked or 1)


def results_row(case: str, layout: str, optimizer: str, hbm: float) -> dict[str, object]:
    key = dict(zip(plans.KEYS, ("v5e:2x2", case, layout, "no", optimizer), strict=True))
    return dict.fromkeys(measure.COLUMNS, "") | key | {"hbm_bytes": hbm, "peak_bytes": 1e6, "version": "any"}


@pytest.mark.parametrize(("passes", "verdict"), [(6.02, "reached"), (7, "missed")])
def test_the_report_compares_with_sgd_and_says_what_was_missed(passes, verdict, tmp_path):
    rows = [results_row("update", "single", "sgd", 5e6), results_row("update", "single", "eva+sgd", passes * 1e6)]
    rows.append(results_row("mlp", "data", "eva+sgd", 1))
    measure.write(tmp_path / "cost_tpu.csv", dict(enumerate(rows)))
    (tmp_path / "overhead_cpu.csv").write_text(
        f"case,optimizer,layers,update,version\nmlp-20,eva+sgd,21,{80.0 if verdict == 'reached' else 80.1},any\n"
    )
    report.write_report(tmp_path, tmp_path / "cost.md")
    text = (tmp_path / "cost.md").read_text()
    assert f"| ≤ 1.21 | {passes / 5:.4f} | {verdict} |" in text
    assert f"| v5e:2x2 | update | single | 5 MB | {passes / 5:.4f} |" in text
    assert f"| mlp-20, eva+sgd | ≤ 80 | {80 if verdict == 'reached' else 80.1} | {verdict} |" in text
    assert "| mlp |" not in text  # nothing to compare it with


def test_tables_replace_those_that_a_page_has(tmp_path):
    page = tmp_path / "page.md"
    publish("first", page, "cost")
    page.write_text(f"before\n{page.read_text()}after\n")
    for _ in range(2):
        publish("second", page, "cost")
    text = page.read_text()
    assert (text.startswith("before\n"), text.endswith("\nafter\n")) == (True, True)
    assert (text.count("first"), text.count("second")) == (0, 1)


@pytest.mark.parametrize("planned", [plans.PLANS["tpu"], plans.OVERHEAD])
def test_words_that_name_nothing_are_refused(planned):
    with pytest.raises(SystemExit, match=r"--only 'nothing' names nothing that is planned; there are .*eva_adamw"):
        plans.chosen(planned, ["mlp-20" if planned is plans.OVERHEAD else "mlp", "nothing"])


def test_a_gpu_is_asked_for_where_there_is_none():
    if jax.default_backend() == "gpu":
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="--target gpu needs a GPU"):
        targets.devices_of("1 device", "gpu")


@pytest.mark.parametrize(("target", "advice"), [("tpu", "pip install libtpu"), ("h100", "pip install 'jax.cuda12.'")])
def test_a_missing_compiler_is_asked_for(target, advice, monkeypatch):
    monkeypatch.setattr(targets, "find_spec", lambda package: None)
    with pytest.raises(SystemExit, match=f"--target {target} needs .*: {advice}"):
        targets.prepare_environment(target)


def test_what_is_added_is_counted_for_two_targets(capsys):
    with pytest.raises(SystemExit):
        program.parse_arguments(["--target", "tpu", "--overhead"])
    assert "--overhead is counted for cpu and h100, got --target tpu" in capsys.readouterr().err


def test_words_narrow_what_is_planned():
    planned = plans.PLANS["tpu"]
    assert plans.chosen(planned, []) == planned
    found = plans.chosen(planned, ["mlp", "vit", "data", "no", "eva+sgd", "adamw"])
    groups = {("v5e:2x2", "vit"), *((device, "mlp") for device in ("v5e:2x2", "v5e:16x16", "v5p:2x2x1", "v6e:2x2"))}
    assert sorted(found) == sorted((*group, "data", "no", name) for group in groups for name in ("eva+sgd", "adamw"))

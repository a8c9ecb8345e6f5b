"""The program as it is called: options and their errors, runs that are killed, stopped and resumed, the comparison."""

import json
import os
import signal
import struct
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from examples.train import compare, optimizers
from examples.train.__main__ import main, parse
from examples.train.config import Training
from examples.train.data import pipeline
from examples.train.metrics import read
from examples.train.objectives import classify
from examples.train.steps import make_mesh, make_program
from examples.train.tasks import TASKS
from tests.train.runs import ROOT, assert_equal, restored, saved_steps, start

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("as_a_user")]
AUTOENCODER = ["--task", "mnist-autoencoder", "--model", "hidden=(32,16),code=8", "--batch", "32"]


# Options


def refused(capsys, *arguments: str) -> str:
    """The one line that the program says before it ends."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--task", "cifar10-resnet21"], "unknown task 'cifar10-resnet21'; did you mean cifar10-resnet20?"),
        (["--optimizer", "eva_adam"], "unknown optimizer 'eva_adam'; did you mean eva_adamw?"),
        (["--lerning-rate", "1"], "unknown setting 'lerning-rate'; did you mean learning-rate?"),
        (["--training.lerning-rate=1"], "unknown setting 'training.lerning-rate'"),
        (["--steps", "many"], "steps: expected a value of type int, got 'many'."),
        (["--augment", "perhaps"], "input.augment: expected true or false, got 'perhaps'."),
        (["--steps"], "expected one argument"),
        (["stray"], "unexpected argument 'stray'"),
        (["--options", "damping"], "--options: expected name=value, separated by commas, got 'damping'."),
        (["--options", "damp=1"], "unknown option of eva_adamw 'damp'"),
        (["--options", "damping=-1"], "eva_adamw: eva_optax.eva_adamw: damping"),
        (["--model", "deepth=8"], "unknown field of CifarResNet in --model 'deepth'; did you mean depth?"),
        (["--dtype", "float16"], "unknown dtype 'float16'"),
        (["--schedule", "cosin"], "unknown schedule 'cosin'; did you mean cosine?"),
        (["--batch", "12"], "--batch must be a multiple of 8 devices times 1 parts to accumulate; got 12."),
        (["--fsdp", "3"], "--fsdp must divide the number of devices, 8; got 3."),
        (["--batch", "4096"], "--batch is 4096, more than the 1437 examples of training."),
        (["--data", "/absent"], "/absent: expected a folder of data, found nothing."),
        (["--task", "curves-autoencoder", "--data", "/absent"], "--data synthetic"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, tmp_path, arguments, says):
    assert says in refused(capsys, "--output", str(tmp_path / "run"), *arguments)
    assert not (tmp_path / "run").exists()  # the same command, put right, finds no other run there


def test_help_lists_tasks_and_optimizers(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(f"  {name}" in said for name in TASKS)
    assert all(name in said for name in optimizers.OPTIMIZERS)
    wanted = "cifar10-resnet20 cifar10-resnet110 cifar10-vgg19 cifar10-wrn28-10 cifar100-resnet110 imagenet-resnet50"
    wanted += " imagenet-vit-s16 mnist-autoencoder fashion-autoencoder curves-autoencoder text-decoder"
    assert set(wanted.split()) <= TASKS.keys()


def test_settings_come_from_the_task_the_data_and_the_command_line(capsys):
    main(
        [
            "--task",
            "imagenet-resnet50",
            "--data",
            "/path",
            "--training.learning-rate",
            "3e-3",
            "--profile",
            "--print-config",
        ]
    )
    said = capsys.readouterr().out.splitlines()
    for line in ('task = "imagenet-resnet50"', "input.batch = 1024", "training.label_smoothing = 0.1"):
        assert line in said
    for line in ("training.learning_rate = 0.003", "reports.profile = true", 'input.data = "/path"', "epochs = 90.0"):
        assert line in said
    on_digits, _ = parse(["--task", "imagenet-resnet50", "--batch", "32"])
    assert (on_digits.input.data, on_digits.input.image_size, on_digits.input.batch) == ("digits", 64, 32)


def test_schedules_follow_the_published_milestones():
    step = optimizers.schedule(Training(schedule="step", warmup=0.05), 1000, 0.1)
    values = {at: float(step(at)) for at in (0, 49, 50, 349, 350, 749, 750, 899, 900, 999)}
    assert values[0] < 0.003
    for at, rate in {50: 0.1, 349: 0.1, 350: 0.01, 749: 0.01, 750: 1e-3, 899: 1e-3, 900: 1e-4, 999: 1e-4}.items():
        np.testing.assert_allclose(values[at], rate, rtol=1e-4)
    np.testing.assert_allclose(values[49], 0.1, rtol=0.03)
    cosine = optimizers.schedule(Training(schedule="cosine", warmup=0), 100, 0.1)
    np.testing.assert_allclose([float(cosine(at)) for at in (0, 50, 100)], [0.1, 0.05, 0], atol=1e-7)


def test_smoothed_labels_share_among_all_classes():
    logits, labels = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32), np.array([0, 1, 2, 3, 4, 0])
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = -(0.8 * logs[np.arange(6), labels] + 0.2 * logs.mean(-1))
    got = classify(logits, labels, 0.2)
    np.testing.assert_allclose(got["loss"], wanted, rtol=1e-5)
    np.testing.assert_array_equal(got["accuracy"], logits.argmax(-1) == labels)


# Steps


def program(*arguments: str):
    config, _ = parse([*AUTOENCODER, *arguments])
    training, _ = TASKS[config.task].sources(config)
    batch = next(pipeline.training(training, config, 1))
    return make_program(TASKS[config.task], config, batch, 20, make_mesh(config)), batch


def test_rates_share_the_program_of_a_step():
    text, kernels = [], []
    for rate in ("0.1", "0.2"):
        made, batch = program("--optimizer", "sgd", "--learning-rate", rate, "--warmup", "0", "--weight-decay", "0")
        state = made.create(jax.random.key(0))
        before = np.array(state.params["Dense_0"]["kernel"])
        text.append(made.step.lower(state, batch).as_text())
        state, _ = made.step(state, batch)
        kernels.append(state.params["Dense_0"]["kernel"] - before)
    assert text[0] == text[1]
    np.testing.assert_allclose(kernels[1], 2 * kernels[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("optimizer", [pytest.param("eva_sgd", marks=pytest.mark.slow), "eva_adamw"])
def test_accumulation_equals_the_large_batch(optimizer):
    states = []
    for parts in ("1", "4"):
        made, batch = program("--optimizer", optimizer, "--rank", "-1", "--accumulate", parts, "--warmup", "0")
        state = made.create(jax.random.key(0))
        for _ in range(2):
            state, values = made.step(state, batch)
        states.append(jax.device_get((state, values)))
    for whole, accumulated in zip(*map(jax.tree.leaves, states), strict=True):
        largest = max(0.1, float(np.abs(whole).max()))
        np.testing.assert_allclose(accumulated, whole, rtol=0, atol=5e-5 * largest)  # as Adam divides by small numbers


def test_the_average_of_parameters_is_what_is_evaluated():
    made, batch = program("--optimizer", "eva_sgd", "--ema", "0.3")
    plain, _ = program("--optimizer", "eva_sgd")
    state = made.create(jax.random.key(0))
    wanted = np.array(state.params["Dense_0"]["kernel"])
    for count in (1, 2, 3):
        state, _ = made.step(state, batch)
        decay = min(0.3, (1 + count) / (10 + count))
        wanted = decay * wanted + (1 - decay) * np.asarray(state.params["Dense_0"]["kernel"])
    params, statistics = state.average
    assert "kronecker" not in params["Dense_0"]
    np.testing.assert_allclose(params["Dense_0"]["kernel"], wanted, rtol=1e-5, atol=1e-7)
    batch = batch | {"weights": np.ones(32, np.float32)}
    averaged = plain.state._replace(params=params, statistics=statistics, average=())
    np.testing.assert_allclose(
        made.evaluate(state, batch)[0]["loss"], plain.evaluate(averaged, batch)[0]["loss"], rtol=1e-5
    )
    now = averaged._replace(params=state.params)
    assert abs(float(made.evaluate(state, batch)[0]["loss"]) - float(plain.evaluate(now, batch)[0]["loss"])) > 1e-3


# Runs


def test_a_killed_run_ends_bit_for_bit_where_an_undisturbed_one_ends(tmp_path):
    """With BatchNorm's statistics, augmentation, accumulation and an average of parameters."""
    small = [
        "--task",
        "cifar10-resnet20",
        "--model",
        "depth=8,width=4",
        "--batch",
        "16",
        "--accumulate",
        "2",
        "--rank",
        "2",
    ]
    small += ["--steps", "9", "--save-every", "3", "--log-every", "1", "--evaluate-every", "3", "--ema", "0.9"]
    killed = start([*small, "--output", str(tmp_path / "killed")], devices=8, die_at=8)
    killed.communicate(timeout=900)
    assert killed.returncode == -signal.SIGKILL
    assert max(saved_steps(tmp_path / "killed")) in (3, 6)  # the last one may not have been written to its end
    for name in ("killed", "undisturbed"):
        main([*small, "--output", str(tmp_path / name)])
    got, wanted = (restored(tmp_path / name, 9) for name in ("killed", "undisturbed"))
    assert len(wanted) > 100
    assert_equal(got, wanted)
    lines = [read(tmp_path / name / "metrics.jsonl") for name in ("killed", "undisturbed")]
    assert len(lines[1]) == 9 + 3
    for mine, theirs in zip(*lines, strict=True):
        measured = ("seconds", "examples_per_second", "input_share")
        assert all(mine[name] == theirs[name] for name in theirs if name not in measured), (mine, theirs)


def events(folder) -> list[tuple[str, int, float]]:
    """Tag, step and value of each number in a folder's TensorBoard files."""
    found = []
    for path in folder.glob("events*"):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (size,) = struct.unpack_from("<Q", content, place)
            event = Event.FromString(content[place + 12 : place + 12 + size])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            place += 16 + size
    return found


def test_a_run_stops_at_its_target_and_goes_on_to_another(tmp_path, capsys):
    run = [*AUTOENCODER, "--output", str(tmp_path), "--steps", "40", "--evaluate-every", "5", "--log-every", "5"]
    main([*run, "--target", "0.645", "--profile"])
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    reached = result["reached"]
    assert f"target 0.645 after {reached['steps']} steps" in said
    assert "peak memory" in said
    assert "of a step" in said
    assert "examples a second" in said
    assert 5 <= reached["steps"] < 40
    np.testing.assert_allclose(reached["epochs"], reached["steps"] * 32 / 1437)
    losses = {line["step"]: line["loss"] for line in read(tmp_path / "metrics.jsonl") if line["part"] == "validation"}
    assert max(losses) == reached["steps"]
    assert losses[reached["steps"]] <= 0.645 < losses[reached["steps"] - 5]
    if reached["steps"] >= 15:
        assert list((tmp_path / "profile").rglob("*.pb"))
    shown = {step: value for tag, step, value in events(tmp_path / "tensorboard") if tag == "validation/loss"}
    assert shown == pytest.approx(losses)

    main([*run, "--target", "0.645"])  # is told again, not trained again
    assert max(shown) == max(line["step"] for line in read(tmp_path / "metrics.jsonl"))
    capsys.readouterr()
    says = refused(capsys, *run, "--learning-rate", "0.5")
    assert "holds another run: training.learning_rate is 0.0 there and 0.5 here. Choose another --output." in says
    main(run)
    assert f"from step {reached['steps']}" in capsys.readouterr().out
    steps = [line["step"] for line in read(tmp_path / "metrics.jsonl") if line["part"] == "validation"]
    assert steps == list(range(5, 41, 5))


def test_waiting_for_slow_input_is_counted(tmp_path, monkeypatch):
    load = pipeline.Loader.__call__

    def slow(loader, number):
        time.sleep(0.1)
        return load(loader, number)

    monkeypatch.setattr(pipeline.Loader, "__call__", slow)
    main([*AUTOENCODER, "--optimizer", "sgd", "--steps", "12", "--threads", "1", "--output", str(tmp_path)])
    assert json.loads((tmp_path / "result.json").read_text())["input_share"] > 0.5


def test_a_run_that_diverges_says_so(tmp_path, capsys):
    run = [*AUTOENCODER, "--optimizer", "sgd", "--learning-rate", "1e30", "--steps", "10", "--output", str(tmp_path)]
    for _ in range(2):
        with pytest.raises(SystemExit):
            main([*run, "--log-every", "5"])
        assert "try a lower --learning-rate" in capsys.readouterr().err


def test_a_small_network_learns_the_digits(tmp_path):
    small = ["--model", "depth=8,width=8", "--steps", "150", "--target", "0.9", "--evaluate-every", "25"]
    main(["--task", "cifar10-resnet20", "--image-size", "16", *small, "--output", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["reached"]["steps"] <= 150
    assert result["final"] >= 0.9


def test_a_comparison_prints_its_table_and_runs_nothing_twice(tmp_path, capsys, request):
    request.addfinalizer(lambda: jax.config.update("jax_compilation_cache_dir", None))
    small = [*AUTOENCODER, "--steps", "20", "--evaluate-every", "5", "--log-every", "20", "--rates", "2"]
    command = ["--optimizers", "adamw,eva_adamw", *small, "--output", str(tmp_path)]
    compare.main(command)
    first = capsys.readouterr().out
    runs = sorted(path.parent.name for path in tmp_path.rglob("result.json"))
    assert runs == ["rate-0.000632", "rate-0.000632", "rate-0.002", "rate-0.002"]
    rows = {line.split()[0]: line.split() for line in first.splitlines() if line.startswith(("adamw", "eva_adamw"))}
    rows = {name: row for name, row in rows.items() if len(row) == 9}
    assert rows.keys() == {"adamw", "eva_adamw"}
    assert rows["adamw"][6] == "1.00"
    best = min(json.loads(path.read_text())["best"] for path in (tmp_path / "adamw").rglob("result.json"))
    assert float(rows["adamw"][3]) == pytest.approx(best, rel=1e-3)
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    compare.main(command)
    assert [line.split() for line in capsys.readouterr().out.splitlines() if "adamw" in line][-2:] == list(
        rows.values()
    )
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}


@pytest.mark.slow
def test_the_first_command_learns_the_digits_in_minutes(tmp_path):
    """All defaults: 97% in six minutes on two idle cores, of which waiting for input takes a twentieth at most."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    begin = time.perf_counter()
    command = [sys.executable, "-m", "examples.train", "--output", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    assert time.perf_counter() - begin < 360
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["final"] >= 0.97
    assert result["input_share"] <= 0.05

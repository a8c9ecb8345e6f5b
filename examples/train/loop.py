"""A run from its configuration to its result: trains, evaluates, saves, and goes on where an earlier call ended."""

import contextlib
import json
import math
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import eva_optax
from examples.train import optimizers, tasks
from examples.train.checkpoints import Checkpoints
from examples.train.config import Config, as_dictionary, differences
from examples.train.data import pipeline
from examples.train.data.source import Source
from examples.train.errors import DivergedError, UserError
from examples.train.metrics import Recorder, peak_memory
from examples.train.steps import Program, State, make_mesh, make_program

IN_FLIGHT = 2  # steps that are started before the first of them has ended
PROFILED = (10, 15)
Values = dict[str, float]


@dataclass
class Clock:
    """Time of training steps: without compilation, evaluation and checkpoints.

    Attributes:
      seconds: of the whole run, earlier calls included.
      steps: that this call has timed.
      timed: their seconds.
      waited: the part of these in which devices may have had nothing to do, as there was no batch yet.
    """

    seconds: float = 0.0
    steps: int = 0
    timed: float = 0.0
    waited: float = 0.0

    def add(self, elapsed: float, waited: float) -> None:
        self.seconds += elapsed
        self.steps += 1
        self.timed += elapsed
        self.waited += waited

    def rates(self, batch: int) -> Values:
        """Examples a second, and the share of the time that went into waiting for input."""
        timed = max(self.timed, 1e-9)
        return {"examples_per_second": self.steps * batch / timed, "input_share": self.waited / timed}


def train(config: Config) -> dict[str, Any]:
    """Trains, or returns the result of a run that ended before; `Run.result` says what it holds."""
    task = tasks.find(config.task)
    optimizers.find(config.training.optimizer)
    mesh, folder = make_mesh(config), Path(config.reports.output)
    training, validation = task.sources(config)
    if len(training) < config.input.batch:
        raise UserError(f"--batch is {config.input.batch}, more than the {len(training)} examples of training.")
    per_epoch = len(training) / config.input.batch
    steps = config.steps or math.ceil(config.epochs * per_epoch)
    program = make_program(task, config, validation.load(np.arange(1), None), steps, mesh)
    claim(folder, config)
    finished = folder / "result.json"
    if finished.exists():
        result = json.loads(finished.read_text())
        if "diverged" in result:
            raise DivergedError(result["diverged"])
        if result["target"] == config.target:
            return result
    run = Run(config, task, program, validation, Clock(), steps, per_epoch)
    try:
        result = run(pipeline.training(training, config, steps))
    except DivergedError as error:
        write(finished, {"diverged": str(error)})
        raise
    write(finished, result)
    return result


def write(path: Path, content: Any) -> None:
    """A JSON file that is there as a whole or not at all."""
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".partial")
        partial_path.write_text(json.dumps(content, indent=1))
        partial_path.replace(path)


def claim(folder: Path, config: Config) -> None:
    """Stores the configuration in the folder; refuses a folder that holds another run."""
    stored = folder / "config.json"
    if stored.exists():
        other = differences(json.loads(stored.read_text()), config)
        if other:
            raise UserError(f"{folder} holds another run: {'; '.join(other)}. Choose another --output.")
    else:
        write(stored, as_dictionary(config))


@dataclass
class Run:
    """A run and what it is made of.

    Attributes:
      steps: after which it ends.
      per_epoch: steps of a pass over the training data.
    """

    config: Config
    task: tasks.Task
    program: Program
    validation: Source
    clock: Clock
    steps: int
    per_epoch: float
    profiling: bool = False

    def __call__(self, batches: Any) -> dict[str, Any]:
        """Goes on from the last checkpoint, if there is one, to the end."""
        folder = Path(self.config.reports.output)
        with Checkpoints(folder / "checkpoints") as checkpoints:
            found = checkpoints.restore(self.program.state)
            if found:
                state, notes = found
                batches.set_state(notes["input"])
                self.clock.seconds = notes["seconds"]
            else:
                state = self.program.create(jax.random.key(self.config.seed))
            with Recorder(folder, int(state.step)) as recorder, contextlib.closing(batches):
                recorder.say(self.headline(state))
                return self.train(state, batches, checkpoints, recorder)

    def train(self, state: State, batches: Any, checkpoints: Checkpoints, recorder: Recorder) -> dict[str, Any]:
        reports, begun = self.config.reports, int(state.step)
        evaluate_every = reports.evaluate_every or max(1, round(self.per_epoch))
        save_every = reports.save_every or evaluate_every
        in_flight: deque[Any] = deque()
        window: list[Any] = []
        for done in range(begun + 1, self.steps + 1):
            due = partial(self.due, done)
            self.profile(done - begun)
            start = time.perf_counter()
            batch = self.put(next(batches))
            busy = in_flight and not in_flight[-1]["loss"].is_ready()  # then nothing has waited for the batch
            waited = 0.0 if busy else time.perf_counter() - start
            state, means = self.program.step(state, batch)
            in_flight.append(means)
            window.append(means)
            compiled = done == begun + 1
            if compiled or due(reports.log_every) or due(evaluate_every) or due(save_every):
                in_flight.clear()
                jax.block_until_ready((state, means))
            elif len(in_flight) > IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
            if not compiled:
                self.clock.add(time.perf_counter() - start, waited)
            if due(reports.log_every):
                self.log(done, window, recorder)
                window = []
            reached = due(evaluate_every) and self.evaluate(done, state, recorder)
            if due(save_every) or reached:
                checkpoints.save(done, state, {"input": batches.get_state(), "seconds": self.clock.seconds})
            if reached:
                break
        self.profile(PROFILED[1])
        if optimizers.find(self.config.training.optimizer).tap is not None:
            eva_optax.check(state.opt_state)
        return self.result(recorder)

    def due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self.steps

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows, spread over its devices as a part of the batch of all."""
        return {name: jax.make_array_from_process_local_data(self.program.rows, rows) for name, rows in batch.items()}

    def profile(self, step: int) -> None:
        """Starts and stops the profiler around a few steps of this call."""
        if self.config.reports.profile and step == PROFILED[0]:
            jax.profiler.start_trace(str(Path(self.config.reports.output) / "profile"))
            self.profiling = True
        if self.profiling and step >= PROFILED[1]:
            jax.profiler.stop_trace()
            self.profiling = False

    def log(self, done: int, window: list[Any], recorder: Recorder) -> None:
        means = jax.device_get(window)
        values = {name: float(np.mean([each[name] for each in means])) for name in means[0]}
        if not math.isfinite(values["loss"]):
            raise DivergedError(f"the loss is {values['loss']} at step {done}: try a lower --learning-rate.")
        rates = self.clock.rates(self.config.input.batch)
        recorder.write(done, "training", values | rates, self.clock.seconds)
        speed = f"{rates['examples_per_second']:.0f} a second, input {rates['input_share']:.1%} of a step"
        recorder.say(f"step {done}/{self.steps}  {shown(values)}  {speed}")

    def evaluate(self, done: int, state: State, recorder: Recorder) -> bool:
        """Writes the means over the validation data; whether they are as good as the target."""
        sums, weight = [], []
        for batch in pipeline.validation(self.validation, self.config):
            values, weights = self.program.evaluate(state, self.put(batch))
            sums.append(values)
            weight.append(weights)
        sums, weight = jax.device_get((sums, weight))
        values = {name: float(sum(each[name] for each in sums) / sum(weight)) for name in sums[0]}
        recorder.write(done, "validation", values, self.clock.seconds)
        recorder.say(f"step {done}/{self.steps}  validation: {shown(values)}")
        objective, target = self.task.objective, self.config.target
        return bool(target) and objective.better(values[objective.metric], target)

    def headline(self, state: State) -> str:
        number = sum(leaf.size for leaf in jax.tree.leaves(eva_optax.strip(state.params)))
        training, done = self.config.training, int(state.step)
        return (
            f"{self.config.task}: {number:,} parameters, {training.optimizer} at a rate of "
            f"{optimizers.peak_rate(training):g}, {self.steps} steps ({self.steps / self.per_epoch:.1f} epochs) of "
            f"{self.config.input.batch} from {self.config.input.data}{f', from step {done}' if done else ''}, "
            f"on {jax.device_count()} {jax.devices()[0].device_kind}"
        )

    def result(self, recorder: Recorder) -> dict[str, Any]:
        """What the run came to.

        The final and the best value of the metric, where the target was reached first (None where it was not), seconds
        of training, the metric along the way, and speed, waiting for input and memory of this call.
        """
        metric, target = self.task.objective.metric, self.config.target
        lines = [line for line in recorder.history if line["part"] == "validation"]
        good = [line for line in lines if target and self.task.objective.better(line[metric], target)]
        choose = max if self.task.objective.higher else min
        memory, of = peak_memory()
        return {
            "metric": metric,
            "target": target,
            "final": lines[-1][metric] if lines else None,
            "best": choose(line[metric] for line in lines) if lines else None,
            "steps_per_epoch": self.per_epoch,
            "curve": [[line["step"], line["seconds"], line[metric]] for line in lines],
            "reached": {
                "steps": good[0]["step"],
                "epochs": good[0]["step"] / self.per_epoch,
                "seconds": good[0]["seconds"],
            }
            if good
            else None,
            "seconds": self.clock.seconds,
            **self.clock.rates(self.config.input.batch),
            "peak_memory_gib": memory,
            "peak_memory_of": of,
        }


def shown(values: Values) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def sentence(result: dict[str, Any]) -> str:
    """A result for the terminal."""
    parts = [f"validation {result['metric']} {result['final']:.4g} (best {result['best']:.4g})"]
    if result["target"]:
        reached = result["reached"]
        parts.append(
            f"target {result['target']:g} after {reached['steps']} steps, {reached['epochs']:.1f} epochs, "
            f"{reached['seconds']:.1f} s"
            if reached
            else f"target {result['target']:g} not reached"
        )
    parts.append(f"{result['seconds']:.1f} s of training")
    parts.append(f"{result['examples_per_second']:.0f} examples a second")
    parts.append(f"input {result['input_share']:.1%} of a step")
    parts.append(f"peak memory {result['peak_memory_gib']:.2f} GiB ({result['peak_memory_of']})")
    return "; ".join(parts)

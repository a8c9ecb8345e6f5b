"""What a step costs with Eva: time on a CPU or GPU, and what compilers for TPUs and GPUs say about memory and network.

    python benchmarks/cost.py --target tpu      # needs libtpu and no TPU: pip install libtpu
    python benchmarks/cost.py --target h100     # needs CUDA's libraries and no GPU: pip install "jax[cuda12]"
    python benchmarks/cost.py --target cpu
    python benchmarks/cost.py --target gpu      # where a GPU is
    python benchmarks/cost.py --target cpu --baselines      # also K-FAC and Shampoo, which need older versions of JAX
    python benchmarks/cost.py --target tpu --report             # tables and plot again from what was measured

Results are kept in benchmarks/results/cost_<target>.csv: a second run measures only what is missing there (--fresh
measures everything again). At the end the tables in docs/cost.md and the plot beside it are written anew.
"""

import argparse
import csv
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
KEYS = ["device", "case", "layout", "prefetch", "optimizer"]
TPUS = ("v5e:2x2", "v5e:16x16", "v5p:2x2x1", "v6e:2x2")
# Targets whose programs are compiled and never run, with the package that has the compiler and what installs it.
COMPILED = {"tpu": ("libtpu", "libtpu"), "h100": ("jax_cuda12_plugin", "'jax[cuda12]'")}
# Leaves a TPU's compiler no on-chip memory to prefetch into, so that the traffic is the program's own.
NO_PREFETCH = {"xla_tpu_scoped_vmem_limit_kib": "120000"}
BASE = "sgd"
Key = tuple[str, ...]  # the values of KEYS in one row
DEFAULT_SIZE = {"tpu": "full", "h100": "full", "cpu": "small", "gpu": "full"}


@dataclass(frozen=True)
class Plan:
    """Which optimizers are measured in which layouts of a case on a device, with prefetching or without."""

    device: str
    case: str
    layouts: tuple[str, ...]
    optimizers: tuple[str, ...]
    prefetch: tuple[str, ...] = ("yes",)

    def groups(self) -> Iterator[list[Key]]:
        """The keys of the rows, together those that are compared with each other."""
        for layout in self.layouts:
            for prefetch in self.prefetch:
                yield [(self.device, self.case, layout, prefetch, optimizer) for optimizer in self.optimizers]


ALL = ("sgd", "adamw", "muon", "eva+sgd", "eva_f+sgd", "eva", "eva_adamw")
FEW = ("sgd", "adamw", "eva+sgd")
PARALLEL = ("data", "fsdp", "tensor")
MODELS = ("mlp", "bottlenecks", "gpt-12", "gpt-12-scan", "vit", "resnet50")
DEFAULT_PLANS = {
    "tpu": (
        Plan("v5e:2x2", "update", ("single",), ALL, ("no",)),
        Plan("v5e:2x2", "update-stacked", ("single",), ALL, ("no",)),
        Plan("v5e:2x2", "mlp", ("single", "data"), ALL, ("no",)),
        Plan("v5e:2x2", "mlp", ("single", "data"), FEW, ("yes",)),
        Plan("v5e:2x2", "mlp", ("fsdp", "tensor"), FEW, ("no", "yes")),
        Plan("v5e:2x2", "bottlenecks", ("data",), ALL, ("no",)),
        Plan("v5e:2x2", "gpt-1", ("single", *PARALLEL), FEW, ("no",)),
        Plan("v5e:2x2", "gpt-12-scan", ("data",), FEW, ("no",)),
        Plan("v5e:2x2", "resnet50", ("data",), FEW, ("no",)),
        Plan("v5e:2x2", "vit", ("data",), FEW, ("no",)),
        Plan("v5e:16x16", "mlp", PARALLEL, FEW, ("no",)),
        Plan("v5e:16x16", "gpt-1", ("data",), FEW, ("no",)),
        Plan("v5p:2x2x1", "mlp", PARALLEL, FEW, ("no",)),
        Plan("v6e:2x2", "mlp", PARALLEL, FEW, ("no",)),
        Plan("v6e:2x2", "bottlenecks", ("data",), FEW, ("no",)),
        Plan("v5e:2x2", "gpt-12", ("single", "data"), FEW, ("no",)),
    ),
    "h100": (
        *(Plan("1 GPU", case, ("single",), ALL) for case in ("update", "update-stacked", "mlp", "bottlenecks")),
        *(Plan("1 GPU", case, ("single",), FEW) for case in ("gpt-12", "gpt-12-scan", "vit", "resnet50")),
        Plan("8 GPUs", "mlp", PARALLEL, FEW),
        Plan("8 GPUs", "bottlenecks", ("data",), FEW),
    ),
    "cpu": (
        *(Plan("1 device", case, ("single",), ALL) for case in MODELS),
        *(Plan("8 devices", case, ("data",), ALL) for case in ("mlp", "bottlenecks", "gpt-12")),
    ),
    "gpu": tuple(Plan("1 device", case, ("single",), ALL) for case in MODELS),
}


def main() -> None:
    options = parse_arguments()
    usual = options.size == DEFAULT_SIZE[options.target]
    path = options.results / f"cost_{options.target}{'' if usual else f'_{options.size}'}.csv"
    if not options.report:
        prepare_environment(options.target, options.devices)
        plans = chosen_plans(options)
        devices = list(dict.fromkeys(plan.device for plan in plans))
        if options.target == "cpu" and len(devices) > 1:
            # The number of virtual devices is fixed when JAX starts, and must not disturb the timing: a process each.
            arguments = [argument for argument in sys.argv[1:] if argument != "--baselines"]
            for device in devices:
                subprocess.run([sys.executable, __file__, *arguments, "--devices", device], check=True)
        else:
            measure(plans, path, options)
        if options.baselines:
            measure_baselines(path, options)
    if options.results == RESULTS and usual:
        from cost_report import write_report

        write_report(RESULTS)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    summary, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "cost.py", description=summary, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=sorted(DEFAULT_PLANS), default="cpu")
    parser.add_argument("--size", choices=("full", "small", "tiny"), help="of the models; full, on a CPU small")
    parser.add_argument("--devices", nargs="*", help=f"of the target; TPUs: {', '.join(TPUS)}; GPUs: 1 GPU, 8 GPUs")
    parser.add_argument("--cases", nargs="*", help="models, or update and update-stacked")
    parser.add_argument("--layouts", nargs="*", choices=("single", *PARALLEL))
    parser.add_argument("--optimizers", nargs="*", help=f"{BASE} is the measure and always runs")
    parser.add_argument("--prefetch", nargs="*", choices=("yes", "no"), help="whether the compiler may; TPU only")
    parser.add_argument("--repetitions", type=int, default=20, help="timed steps of each optimizer, in turn")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--fresh", action="store_true", help="measure again what the CSV has")
    parser.add_argument("--baselines", action="store_true", help="also K-FAC and Shampoo, in environments of their own")
    parser.add_argument("--report", action="store_true", help="measure nothing: tables and plot from the CSV files")
    options = parser.parse_args(arguments)
    options.size = options.size or DEFAULT_SIZE[options.target]
    if options.repetitions < 1:
        parser.error(f"--repetitions must be at least 1, got {options.repetitions}")
    if options.baselines and options.target != "cpu":
        parser.error(f"--baselines run on a CPU only, got --target {options.target}")
    return options


def prepare_environment(target: str, devices: list[str] | None) -> None:
    """What must be set before JAX is imported.

    Raises:
      SystemExit: if the compiler for the target is not installed.
    """
    if target in COMPILED:
        package, requirement = COMPILED[target]
        if find_spec(package) is None:
            raise SystemExit(f"cost.py: --target {target} needs {package}: pip install {requirement}")
    if target == "tpu":
        wanted = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
        os.environ.update(wanted, JAX_PLATFORMS="cpu")
    elif target == "h100":
        # No autotuning, which would need the GPU: every matrix product is one of cuBLAS.
        flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
        os.environ.update(CUDA_VISIBLE_DEVICES="-1", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", JAX_PLATFORMS="")
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    elif target == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        count = int(devices[0].split()[0]) if devices else 1
        if count > 1:
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()


def chosen_plans(options: argparse.Namespace) -> list[Plan]:
    """The default plans, narrowed by the options; what an option names beyond them is added.

    Raises:
      SystemExit: for a case or an optimizer that does not exist.
    """
    from models import CASES
    from steps import OPTIMIZERS

    for what, given, known in (
        ("case", options.cases, (*CASES, *UPDATES)),
        ("optimizer", options.optimizers, OPTIMIZERS),
    ):
        unknown = [name for name in given or () if name not in known]
        if unknown:
            raise SystemExit(f"cost.py: no {what} {unknown[0]!r}; there are {', '.join(known)}")
    default, chosen = DEFAULT_PLANS[options.target], []
    for device in options.devices or dict.fromkeys(plan.device for plan in default):
        here = [plan for plan in default if plan.device == device]
        for case in options.cases or dict.fromkeys(plan.case for plan in here):
            usual = ("no",) if options.target == "tpu" else ("yes",)
            beyond = Plan(device, case, ("single",) if case in UPDATES else ("data",), FEW, usual)
            for plan in [plan for plan in here if plan.case == case] or [beyond]:
                wanted, prefetch = options.layouts or plan.layouts, tuple(options.prefetch or plan.prefetch)
                layouts = tuple(layout for layout in wanted if case not in UPDATES or layout == "single")
                optimizers = dict.fromkeys((BASE, *(options.optimizers or plan.optimizers)))
                chosen.append(replace(plan, layouts=layouts, optimizers=tuple(optimizers), prefetch=prefetch))
    return chosen


# Kernels of 12 blocks of a GPT with 768 features, without embeddings: 85 million parameters.
BLOCK = dict.fromkeys(("query", "key", "value", "out"), (768, 768)) | {"up": (768, 3072), "down": (3072, 768)}
UPDATES = {
    "update": ({f"{name}_{layer}": shape for layer in range(12) for name, shape in BLOCK.items()}, 0),
    "update-stacked": (BLOCK, 12),
}


def measure(plans: list[Plan], path: Path, options: argparse.Namespace) -> None:
    """Measures what the results file lacks, and writes it after each step."""
    from measure import compile_step, time_in_turn
    from tqdm import tqdm

    version, rows = software_version(options.target), read_rows(path)
    missing, planned = [], set()
    for group in itertools.chain.from_iterable(plan.groups() for plan in plans):
        keys = [key for key in group if key not in planned]
        planned.update(keys)
        stale = [key for key in keys if options.fresh or rows.get(key, {}).get("version") != version]
        # Ratios of times are taken in one run, so that one missing optimizer means all of them again.
        missing.append(keys if stale and is_timed(keys[0], options.target) else stale)
    with tqdm(total=sum(map(len, missing)), desc=f"cost on {options.target}", unit="step", smoothing=0) as progress:
        for keys in missing:
            timed: dict[Key, Any] = {}
            for key in keys:
                progress.set_postfix_str(" ".join(key))
                device, case, layout, prefetch, optimizer = key
                step = make_step(device, case, layout, optimizer, options.target, options.size)
                compiled, figures = compile_step(step, NO_PREFETCH if prefetch == "no" else None)
                rows[key] = dict(zip(KEYS, key, strict=True)) | asdict(figures) | {"version": version}
                if is_timed(key, options.target):
                    timed[key] = compiled, step
                else:
                    write_rows(path, rows.values())
                progress.update()
            if timed:
                progress.set_postfix_str(" ".join((*keys[0][:3], "timing")))
                for key, times in time_in_turn(timed, options.repetitions, progress.refresh).items():
                    rows[key] |= asdict(times)
                write_rows(path, rows.values())


def measure_baselines(path: Path, options: argparse.Namespace) -> None:
    """Adds the times of what runs only with an older JAX, as ratios to SGD with that JAX."""
    from baselines import BASELINES, run_baseline

    rows = read_rows(path)
    for name, packages in BASELINES.items():
        key = ("1 device", "mlp", "single", "yes", name)
        version = ", ".join(packages[:2])
        if options.fresh or rows.get(key, {}).get("version") != version:
            times = run_baseline(name, options.repetitions)
            rows[key] = dict(zip(KEYS, key, strict=True)) | times | {"version": version}
            write_rows(path, rows.values())


def is_timed(key: Key, target: str) -> bool:
    """Whether the step of this row runs, on one device of this machine."""
    return target not in COMPILED and key[2] == "single"


def make_step(device: str, case: str, layout: str, optimizer: str, target: str, size: str) -> Any:
    """The step of one row of the table."""
    import numpy as np
    from jax.sharding import Mesh
    from models import CASES
    from steps import OPTIMIZERS, training_step, update_alone

    mesh, rows = None, 1
    if target in COMPILED or layout != "single":
        chips = np.array(devices_of(device, target))
        if layout == "single":
            chips = chips[:1]
        # Tensor parallel: each batch row is shared by two chips, by four in a pod.
        columns = 1 if layout != "tensor" else 2 if len(chips) < 16 else 4
        rows = len(chips) // columns
        mesh = Mesh(chips.reshape(rows, columns), ("data", "model"))
    if case in UPDATES:
        shapes, stacked = UPDATES[case]
        return update_alone(shapes, OPTIMIZERS[optimizer], stacked, mesh)
    return training_step(CASES[case][size](rows), OPTIMIZERS[optimizer], mesh, layout)  # pyright: ignore[reportArgumentType]


def devices_of(device: str, target: str) -> list[Any]:
    """The chips of a topology in its order, or the devices of this machine.

    Raises:
      SystemExit: if JAX sees no GPU and the target is one.
    """
    import jax

    if target not in COMPILED:
        try:
            return list(jax.devices(target))
        except RuntimeError as error:
            raise SystemExit(f"cost.py: --target {target} needs a GPU and a JAX that sees it ({error})") from error
    from jax.experimental import topologies

    if target == "h100":
        count, _, unit = device.partition(" ")
        if not count.isdigit() or unit not in ("GPU", "GPUs"):
            raise SystemExit(f"cost.py: --devices for an H100 are such as '1 GPU' and '8 GPUs', got {device!r}")
        described = Path(__file__).with_name("h100.txtpb").read_text()
        shape = f"1x1x{count}"  # slices, hosts, GPUs of one host
        return list(topologies.get_topology_desc("", "cuda", target_config=described, topology=shape).devices)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=device)
    return list(topologies.make_mesh(topology, (len(topology.devices),), ("data",)).devices.flat)


def software_version(target: str) -> str:
    """What a row depends on; another version measures anew."""
    from importlib.metadata import version

    found = f"jax {version('jax')}"
    if target == "tpu":
        return f"{found}, libtpu {version('libtpu')}"
    if target == "h100":
        return f"{found}, CUDA 12.9"
    return f"{found}, {devices_of('', 'gpu')[0].device_kind}" if target == "gpu" else found


def read_rows(path: Path) -> dict[Key, dict[str, Any]]:
    """The rows of a results file by key; none if there is no file."""
    if not path.exists():
        return {}
    with path.open() as file:
        return {tuple(row[key] for key in KEYS): row for row in csv.DictReader(file)}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a results file, whole or not at all."""
    from measure import Figures, Times, names

    path.parent.mkdir(exist_ok=True)
    new = path.with_suffix(".new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*KEYS, *names(Times), *names(Figures), "version"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: [row[key] for key in KEYS[:-1]]))
    new.replace(path)


if __name__ == "__main__":
    main()

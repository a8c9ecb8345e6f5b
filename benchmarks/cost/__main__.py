"""What a step costs with Eva: time on a CPU or GPU, and what compilers for TPUs and GPUs say about memory and network.

    python -m benchmarks.cost --target tpu      # needs libtpu and no TPU: pip install libtpu
    python -m benchmarks.cost --target h100     # needs CUDA's libraries and no GPU: pip install "jax[cuda12]"
    python -m benchmarks.cost --target cpu
    python -m benchmarks.cost --target gpu      # where a GPU is
    python -m benchmarks.cost --target cpu --baselines      # also K-FAC and Shampoo, which need older versions of JAX
    python -m benchmarks.cost --overhead        # equations, arrays, instructions, compilation: also with --target h100
    python -m benchmarks.cost --report          # the tables again from what was measured

Results are kept in benchmarks/results/cost_<target>.csv and overhead_<target>.csv: a second run measures only what is
missing there (--fresh measures everything again). At the end the tables in docs/cost.md are written anew.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.results import DOCS, RESULTS
from benchmarks.cost.targets import SIZES, prepare_environment


def main() -> None:
    options = parse_arguments()
    usual = options.size == ("full" if options.overhead else SIZES[options.target])
    kind = "overhead" if options.overhead else "cost"
    path = options.results / f"{kind}_{options.target}{'' if usual else f'_{options.size}'}.csv"
    prepare_environment("cpu" if options.report else options.target, options.devices)
    if not options.report:
        run(path, options)
    if options.results == RESULTS and usual:
        from benchmarks.cost.report import write_report

        write_report(RESULTS, DOCS / "cost.md")


def run(path: Path, options: argparse.Namespace) -> None:
    """Measures what is missing in the results file."""
    if options.overhead:
        from benchmarks.cost.overhead import measure_overhead

        return measure_overhead(path, options)
    from benchmarks.cost.measure import measure, measure_baselines
    from benchmarks.cost.plans import chosen_plans

    plans = chosen_plans(options)
    devices = list(dict.fromkeys(group[0] for group in plans))
    if options.target == "cpu" and len(devices) > 1:
        # The number of virtual devices is fixed when JAX starts, and must not disturb the timing: a process each.
        arguments = [argument for argument in sys.argv[1:] if argument != "--baselines"]
        for device in devices:
            subprocess.run([sys.executable, "-m", "benchmarks.cost", *arguments, "--devices", device], check=True)
    else:
        measure(plans, path, options)
    if options.baselines:
        measure_baselines(path, options)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    summary, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "benchmarks.cost", None, summary, usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=SIZES, default="cpu")
    parser.add_argument("--size", choices=("full", "small", "tiny"), help="of the models; full, times on a CPU small")
    parser.add_argument("--devices", nargs="*", help="of the target, such as v5e:2x2, 8 GPUs, 8 devices")
    parser.add_argument("--cases", nargs="*", help="models, or update and update-stacked")
    parser.add_argument("--layouts", nargs="*", choices=("single", "data", "fsdp", "tensor"))
    parser.add_argument("--optimizers", nargs="*", help="sgd is the measure and always runs")
    parser.add_argument("--prefetch", nargs="*", choices=("yes", "no"), help="whether the compiler may; TPU only")
    parser.add_argument(
        "--repetitions", type=int, help="timed steps, 20, or compilations, 3, of each optimizer in turn"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--fresh", action="store_true", help="measure again what the CSV has")
    parser.add_argument("--baselines", action="store_true", help="also K-FAC and Shampoo, in environments of their own")
    parser.add_argument("--overhead", action="store_true", help="what is added beside arithmetic; on cpu and h100")
    parser.add_argument("--report", action="store_true", help="measure nothing: tables from the CSV files")
    options = parser.parse_args(arguments)
    options.size = options.size or ("full" if options.overhead else SIZES[options.target])
    if options.repetitions is None:
        options.repetitions = 3 if options.overhead else 20
    if options.repetitions < 1:
        parser.error(f"--repetitions must be at least 1, got {options.repetitions}")
    if options.baselines and options.target != "cpu":
        parser.error(f"--baselines run on a CPU only, got --target {options.target}")
    if options.overhead and options.target not in ("cpu", "h100"):
        parser.error(f"--overhead is counted for cpu and h100, got --target {options.target}")
    return options


if __name__ == "__main__":
    main()

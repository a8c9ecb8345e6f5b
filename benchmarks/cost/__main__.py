"""What a step costs with Eva: time on a CPU or GPU, and what compilers for TPUs and GPUs say about memory and network.

    python -m benchmarks.cost --target tpu      # needs libtpu and no TPU: pip install libtpu
    python -m benchmarks.cost --target h100     # needs CUDA's libraries and no GPU: pip install "jax[cuda12]"
    python -m benchmarks.cost --target cpu
    python -m benchmarks.cost --target gpu      # where a GPU is
    python -m benchmarks.cost --overhead        # equations, arrays, instructions, compilation: also with --target h100
    python -m benchmarks.cost --report          # the tables again from what was measured

Results are kept in benchmarks/results/cost_<target>.csv and overhead_<target>.csv: a second run measures only what is
missing there. `--only mlp vit eva` keeps of what is planned the rows that these words name: devices, cases, layouts,
optimizers; SGD is the measure and always runs. At the end the tables in docs/cost.md are written anew.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.common.results import DOCS, RESULTS, command_line
from benchmarks.cost.plans import OVERHEAD, PLANS, chosen
from benchmarks.cost.targets import TARGETS, prepare_environment


def main() -> None:
    options = parse_arguments()
    if not options.report:
        run(options)
    if options.results == RESULTS:
        from benchmarks.cost.report import write_report

        write_report(RESULTS, DOCS / "cost.md")


def run(options: argparse.Namespace) -> None:
    """Measures what is missing in the results file."""
    path = options.results / f"{'overhead' if options.overhead else 'cost'}_{options.target}.csv"
    keys = chosen(OVERHEAD if options.overhead else PLANS[options.target], options.only)
    devices = ["1 device"] if options.overhead else list(dict.fromkeys(key[0] for key in keys))
    if options.target == "cpu" and len(devices) > 1:
        # The number of virtual devices is fixed when JAX starts, and must not disturb the timing: a process each.
        command = [sys.executable, "-m", "benchmarks.cost", "--results", str(options.results), "--only", *options.only]
        for device in devices:
            subprocess.run([*command, device], check=True)
        return
    prepare_environment(options.target, devices[0])
    if options.overhead:
        from benchmarks.cost.overhead import measure
    else:
        from benchmarks.cost.measure import measure
    measure(keys, path, options.target)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line("cost", __doc__ or "")
    parser.add_argument("--target", choices=TARGETS, default="cpu")
    parser.add_argument("--overhead", action="store_true", help="what is added beside arithmetic; on cpu and h100")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="devices, cases, layouts, optimizers")
    options = parser.parse_args(arguments)
    if options.overhead and options.target not in ("cpu", "h100"):
        parser.error(f"--overhead is counted for cpu and h100, got --target {options.target}")
    return options


if __name__ == "__main__":
    main()

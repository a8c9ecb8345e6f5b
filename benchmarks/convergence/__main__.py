"""How fast and how far SGD, AdamW and Muon train with and without each member of the family.

    python -m benchmarks.convergence                    # some hours on one core; resumes where it stopped
    python -m benchmarks.convergence --small            # a quick look
    python -m benchmarks.convergence --tasks cnn --optimizers muon eva_muon
    python -m benchmarks.convergence --report           # only the tables and the plots, from the CSV files

docs/convergence.md describes the method and says what was found. Results are appended run by run to `convergence.csv`
and `step_times.csv`; runs that are there are not repeated. Processes with different tasks may share these files.
"""

from pathlib import Path

from tqdm import tqdm

from benchmarks.common.results import DOCS, RESULTS, command_line
from benchmarks.convergence import report
from benchmarks.convergence.optimizers import OPTIMIZERS
from benchmarks.convergence.records import Records
from benchmarks.convergence.tasks import TASKS
from benchmarks.convergence.training import forget_programs
from benchmarks.convergence.tuning import EXTENSIONS, measure, measure_times

SMALL = ("sgd", "adamw", "muon", "eva+sgd", "eva_adamw", "eva_muon")


def main() -> None:
    parser = command_line("convergence", __doc__ or "")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="default: all")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, help="default: all")
    parser.add_argument("--small", action="store_true", help="40 steps of six optimizers, into results/convergence")
    options = parser.parse_args()
    tasks = [TASKS[name] for name in options.tasks or (["diabetes"] if options.small else TASKS)]
    optimizers = [OPTIMIZERS[name] for name in options.optimizers or (SMALL if options.small else OPTIMIZERS)]
    results = Path("results", "convergence") if options.small and options.results == RESULTS else options.results
    records = Records(results)

    if not options.report:
        with tqdm(total=len(tasks) * len(optimizers), unit="optimizer", smoothing=0) as bar:
            for task in tasks:
                for optimizer in optimizers:
                    bar.set_postfix_str(f"{task.name}, {optimizer.name}")
                    measure(records, task, optimizer, *((40, 0) if options.small else (task.steps, EXTENSIONS)))
                    bar.update()
                measure_times(records, task, optimizers)
                forget_programs()  # hundreds of them: the process would run out of memory mappings
    report.write(records, DOCS if results == RESULTS else results)


if __name__ == "__main__":
    main()

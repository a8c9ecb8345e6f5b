"""Trains a model of the Eva paper's experiments, or another, on data of yours or on scikit-learn's digits.

    python -m examples.train --task cifar10-resnet20                             # digits, no data set needed
    python -m examples.train --task cifar10-resnet110 --optimizer eva_adamw --data PATH --output DIR
    python -m examples.train --task cifar10-resnet110 --data PATH --target 0.935 --training.learning-rate 1e-3

The same command goes on where an earlier one ended, whatever ended it. On several hosts, each runs it at the same
time with an --output that all of them see: TPU pod slices, Slurm, Kubernetes and Open MPI are recognised, and elsewhere
--coordinator host0:1234 --processes 2 --process 0 (and --process 1 on host 1) connect them.
"""

import argparse
from collections.abc import Sequence

import jax

from examples.train.command_line import Parser, add_settings, changes, fail, lists
from examples.train.config import Config
from examples.train.errors import UserError
from examples.train.loop import sentence, train
from examples.train.processes import connect
from examples.train.tasks import configure


def parse(arguments: Sequence[str] | None = None) -> tuple[Config, bool]:
    """The configuration, and whether to print it and no more."""
    parser = Parser(
        "python -m examples.train",
        description=__doc__,
        epilog=lists(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--print-config", action="store_true", help="print all settings and end")
    add_settings(parser)
    options, given = changes(parser, arguments)
    return configure(given), options.print_config


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program: on its command line or, by a process that has joined the others itself, with arguments."""
    try:
        config, only_print = parse(arguments)
        if only_print:
            print(config)
            return
        if arguments is None:
            connect(config.machine)
        result = train(config)
        if jax.process_index() == 0:
            print(sentence(result))
    except UserError as error:
        fail(error)


if __name__ == "__main__":
    main()

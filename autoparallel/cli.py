"""The command line: results go to stdout, progress and errors to stderr.

Each command is a file in autoparallel/commands/. Torch is imported inside of the command that needs
it, so that --help is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from autoparallel.commands.calibrate_command import CALIBRATE
from autoparallel.commands.command import CommandParser
from autoparallel.commands.compare_command import COMPARE
from autoparallel.commands.dims_command import DIMS
from autoparallel.commands.doctor_command import DOCTOR
from autoparallel.commands.explain_command import EXPLAIN
from autoparallel.commands.export_command import EMIT, EXPORT
from autoparallel.commands.measure_command import MEASURE
from autoparallel.commands.plan_command import PLAN
from autoparallel.commands.show_command import SHOW
from autoparallel.commands.simulate_command import SIMULATE
from autoparallel.errors import (
    AutoParallelError,
    InputsNeededError,
    MemoryLimitError,
    PlanError,
    WorldSizeError,
)
from autoparallel.train.train_command import add_train
from autoparallel.train.trained_commands import add_trained_commands

__all__ = ["main"]

# In the order of the help: from planning a model to looking at it.
_COMMANDS = (PLAN, DIMS, SHOW, EXPLAIN, COMPARE, SIMULATE, MEASURE, EXPORT, EMIT, CALIBRATE, DOCTOR)
_STATUS = (
    "Exit status: 0 for done, 1 where the answer is no (no plan fits, the doctor has found "
    "something), 2 for arguments that are wrong."
)

# Here nobody can pass the argument that the library asks for.
_INPUTS = (
    "let the function return (model, example_inputs), or give the model a method example_inputs()"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status: 0, 1 where the answer is no, 2 for wrong
    arguments.

    arguments: those of the command line, without the program's name; by default sys.argv's. Raises
    SystemExit, as argparse does, for --help and for arguments that cannot be parsed.

    >>> main(["calibrate", "--output", "machine.txt"])
    2
    """
    parser = _parser()
    # Completion asks the program itself, by a variable that the shell sets: nobody else pays.
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except AutoParallelError as error:
        if isinstance(error, InputsNeededError):
            error = InputsNeededError(error.what, why=error.why, fix=_INPUTS)
        print(f"error: {error}", file=sys.stderr)
        # What was asked for is wrong, or it is right and the answer is no.
        wrong = isinstance(error, PlanError | InputsNeededError | WorldSizeError)
        return 2 if wrong and not isinstance(error, MemoryLimitError) else 1
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; nothing more is to be flushed on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _parser() -> CommandParser:
    """Return the parser of all commands."""
    parser = CommandParser(
        prog="autoparallel",
        description="Splits any PyTorch model over devices by itself.",
        epilog=_STATUS,
    )
    parser.examples = PLAN.examples[:1]
    parser.commands = _COMMANDS
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in _COMMANDS:
        about = command.about[0].upper() + command.about[1:]
        own = commands.add_parser(command.name, help=command.about, description=f"{about}.")
        own.examples = command.examples
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    add_train(commands)
    add_trained_commands(commands)
    return parser

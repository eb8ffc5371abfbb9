"""The command `train`: reads the configuration, trains or plans, and turns errors into one message.

Torch is imported when the configuration has been found good, so that --help is quick and a mistake
is told within a second.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from autoparallel.errors import AutoParallelError
from autoparallel.train.config_text import known_keys, read_config, shipped_configs
from autoparallel.train.run_config import RunConfig

__all__ = ["add_train", "leave", "tell", "train_command"]

ABOUT = "train a model as a configuration says, on one process or on all that torchrun started"
_FLAGS = ("--help", "-h", "--dry-run", "--prepare", "--json")
# Seconds that the other ranks give rank 0 to tell an error, which all of them have.
_TELLING = 30.0


def add_train(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command `train`.

    Its keys are too many for argparse, and unknown ones get a better answer here: it takes all that
    follows as it is.
    """
    parser = commands.add_parser("train", help=ABOUT, add_help=False, prefix_chars="\0")
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(run=lambda options: train_command(options.arguments))


def train_command(arguments: Sequence[str]) -> int:
    """Run the command, and return its exit status.

    It is 0, 1 for a run that has failed, 2 for a configuration that cannot be run, and 128 and its
    number for a signal that ended the run after a checkpoint. Where other processes train with this
    one, it ends the process with that status.

    >>> train_command(["gpt-tiny", "--training.steps=-1", "--dry-run"])
    2
    """
    if "--help" in arguments or "-h" in arguments:
        print(help_text())
        return 0
    flags = {text for text in arguments if text in _FLAGS or text.startswith("--ranks=")}
    others = [text for text in arguments if text not in flags]
    names = [text for text in others if not text.startswith("-")]
    try:
        if len(names) > 1:
            raise _wrong_arguments(f"two configurations: {names[0]} and {names[1]}")
        config = read_config(names[0] if names else None, [t for t in others if t not in names])
        ranks = _asked_ranks(flags)
        if not names and not others:
            raise _wrong_arguments("no configuration")
    except AutoParallelError as error:
        return tell(error, 2)
    if "--dry-run" in flags:
        return _dry_run(config, ranks, as_json="--json" in flags)
    if "--prepare" in flags:
        return _prepare(config)
    return _train(config)


def _wrong_arguments(what: str) -> AutoParallelError:
    """Return the error for a command line that cannot be understood."""
    return AutoParallelError(
        what,
        why="the command is: autoparallel train CONFIG [--section.key=value ...]",
        fix=f"name a TOML file, or one that is shipped: {', '.join(shipped_configs())}",
    )


def _asked_ranks(flags: set[str]) -> int | None:
    """Return the number of ranks that a dry run is for, None where it is not said."""
    for text in flags:
        if text.startswith("--ranks="):
            number = text.partition("=")[2]
            if not number.isdecimal() or int(number) < 1:
                raise AutoParallelError(text, fix="give a number of ranks: --ranks=8")
            return int(number)
    return None


def tell(error: BaseException, status: int, *, everywhere: bool = False) -> int:
    """Print an error on rank 0, or on all ranks, and return the exit status.

    torchrun ends all processes as soon as one has failed. So the other ranks wait to be ended by it
    once rank 0 has told the error; if they had gone first, rank 0 might not have come to it. A rank
    that nobody ends has an error of its own, and tells it.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank and not everywhere:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_TELLING)
    whose = f"rank {rank}: " if rank else ""
    print(f"{whose}error: {error}", file=sys.stderr, flush=True)
    return status


def _train(config: RunConfig) -> int:
    """Train; where there are other processes, end this one."""
    from autoparallel.train.runner import run_training

    status = 0
    try:
        result = run_training(config)
        if result.signal:
            status = 128 + result.signal
            name = f"{config.folder}/checkpoints"
            saved = f"saved in {name}" if config.checkpoint.every else "not saved"
            if int(os.environ.get("RANK", "0")) == 0:
                print(
                    f"ended by signal {result.signal} after step {result.steps}, {saved}",
                    file=sys.stderr,
                )
    except AutoParallelError as error:
        # Errors of one rank alone, and of ranks that waited for another, are told by each.
        status = tell(error, _status_of(error), everywhere=type(error) is AutoParallelError)
    except KeyboardInterrupt:
        status = 130
    return leave(status)


def _status_of(error: AutoParallelError) -> int:
    """Return 2 for what the user asked for and cannot be, 1 for what has failed on the way."""
    from autoparallel.errors import CheckpointError
    from autoparallel.train.runner import StoppedError

    failed = type(error) is AutoParallelError or isinstance(error, CheckpointError | StoppedError)
    return 1 if failed else 2


def leave(status: int) -> int:
    """Return the status; where there are other processes, end this one with it, at once.

    gloo's threads may still hold tensors that belong to Python; when they let go of one while the
    interpreter shuts down, the process aborts ("terminate called without an active exception").
    """
    import torch.distributed as dist

    if "RANK" not in os.environ or not dist.is_initialized():
        return status
    if status == 0:
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _prepare(config: RunConfig) -> int:
    """Write the token files of a configuration, and say where they are."""
    from autoparallel.train.token_files import open_tokens, prepare_tokens

    try:
        tokens = open_tokens(prepare_tokens(config.data, lambda text: print(text, file=sys.stderr)))
    except AutoParallelError as error:
        return tell(error, 2)
    print(f"{tokens.folder}: {len(tokens.train):,} tokens, {len(tokens.held_out):,} held out")
    return 0


def _dry_run(config: RunConfig, ranks: int | None, *, as_json: bool) -> int:
    """Print the configuration, the plan, and what a step is expected to take."""
    from autoparallel.train.dry_run import dry_run

    try:
        report = dry_run(config, ranks)
    except AutoParallelError as error:
        return tell(error, 2)
    print(json.dumps(report.to_rows(), indent=1) if as_json else report)
    return 0


def help_text() -> str:
    """Return the help: how the command is called, and every key with its default.

    >>> "training.steps" in help_text()
    True
    """
    lines = [
        "usage: autoparallel train CONFIG [--section.key=value ...]",
        "       torchrun --nproc-per-node 8 -m autoparallel train CONFIG [--section.key=value ...]",
        "",
        f"{ABOUT[0].upper()}{ABOUT[1:]}.",
        "",
        f"CONFIG is a TOML file, or one that is shipped: {', '.join(shipped_configs())}.",
        "",
        "  --dry-run    print the plan, the predicted step and memory, and what would be logged;",
        "               with --ranks=N for so many ranks; takes no devices; --json for programs",
        "  --prepare    write the token files, and end",
        "  --help       this text",
        "",
        "keys, with their defaults:",
    ]
    for path, default, meaning in known_keys():
        shown = config_value(default)
        lines += [f"  --{path}={shown}", *_wrapped(meaning)]
    return "\n".join(lines)


def config_value(value: object) -> str:
    """Return a default as it is written on a command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | dict):
        return "[]" if isinstance(value, tuple) else "{}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _wrapped(text: str) -> list[str]:
    """Return the lines of a meaning."""
    import textwrap

    return textwrap.wrap(text, 90, initial_indent=" " * 8, subsequent_indent=" " * 8)

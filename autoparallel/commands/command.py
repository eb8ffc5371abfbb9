"""A command of the command line: its name, what it is for, its arguments, and what it does."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Command", "CommandParser", "positive", "progress"]


@dataclass(frozen=True, slots=True)
class Command:
    """A Command is one word after `autoparallel`.

    name: that word. about: one line, without a full stop. examples: command lines to begin with,
    the first of which heads the help. add_arguments: gives a parser the command's arguments. run:
    does what the parsed arguments ask for, and returns the exit status: 0 for done, 1 for an answer
    that is no, 2 for arguments that are wrong. Errors of the project may be raised.

    >>> Command("doctor", "say what is installed", ("autoparallel doctor",), print, int).name
    'doctor'
    """

    name: str
    about: str
    examples: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], object]
    run: Callable[[argparse.Namespace], int]


class CommandParser(argparse.ArgumentParser):
    """A parser whose help begins with examples: most readers look for a line to change.

    examples: command lines, set after the parser was made. commands: of a program. Options may
    stand between arguments of any number, which argparse alone would refuse.
    """

    examples: tuple[str, ...] = ()
    commands: tuple[Command, ...] = ()
    _inside = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse the arguments; see argparse."""
        several = any(action.nargs == "*" for action in self._get_positional_actions())
        if self._inside or not several or self.prefix_chars != "-":
            return super().parse_known_args(args, namespace)
        self._inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False

    def format_help(self) -> str:
        """Return the help, the examples first."""
        lines = "\n".join(f"  {example}" for example in self.examples)
        return (f"example:\n{lines}\n\n" if lines else "") + super().format_help()


def positive(text: str) -> int:
    """Return the number of an option that counts something, for argparse, which tells what is none.

    >>> positive("8")
    8
    """
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number; give one, as 8")
    return int(text)


def progress(text: str) -> None:
    """Tell the user what is being done, on stderr, so that results alone are on stdout."""
    import sys

    print(text, file=sys.stderr, flush=True)

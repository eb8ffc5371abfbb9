"""A program for a compiler: blocks that repeat in it are one function, which is compiled once.

To compile a program of many layers takes as long as it is long, although its layers are alike. So
its repeated lines become a function, and so does what lies before, between and after them. Each
function is compiled by itself, as one graph; that of the blocks is called for every block. What
calls them is Python.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import torch

from autoparallel.rewrite.folded_source import (
    fold_statements,
    names_made,
    names_read,
    values_made,
)
from autoparallel.rewrite.program import Line, Program, compiled, drops_copies, lines_of
from autoparallel.runtime.ranks import Ranks

__all__ = ["block_functions"]


def _is_worth(lines: int, count: int) -> bool:
    """Return whether that many blocks of that many lines become a function.

    Of a GPT, 15 layers take 1.5 times as long to compile as 4, and a call takes as long as some of
    the lines of a small layer.
    """
    return lines >= 10 and lines * (count - 1) >= 300


def block_functions(
    program: Program, parameters: Sequence[torch.Tensor], name: str, ranks: Ranks
) -> Callable[..., Any] | None:
    """Return a function that runs a program function by function; None where too little repeats.

    It takes run(function, *arguments), which is to compile the functions, `Generator.draw_as`, and
    what the program takes. parameters: of the program; blocks are alike where theirs are. name: of
    the model.
    """
    # What is made again in the backward pass is found among all that the whole program saves.
    if drops_copies(program.source):
        return None
    text = _Functions(program, parameters).text()
    return None if text is None else compiled(text, name, ranks, program.names)


class _Functions:
    """The text of a program in functions.

    given: the lines that take its arguments apart, and read sizes off them. statements: those that
    follow. made: the names of all values. kinds: what tells values apart that lines read. draws:
    the keys of random ops. functions: the texts of the functions.
    """

    def __init__(self, program: Program, parameters: Sequence[torch.Tensor]) -> None:
        function = ast.parse(program.source).body[0]
        assert isinstance(function, ast.FunctionDef)
        self.statements = [line for line in function.body if not isinstance(line, ast.Delete)]
        self.made = {"device", *values_made(self.statements)}
        self.given: list[ast.stmt] = []
        while _is_given(self.statements[0]):
            self.given.append(self.statements.pop(0))
        self.kinds: dict[str, str] = {}
        for line in self.given:
            if ast.unparse(line).endswith("] = parameters"):
                for name, one in zip(names_made(line), parameters, strict=True):
                    self.kinds[name] = f"{(*one.shape, one.dtype, one.requires_grad)}"
        self.draws = program.draws
        self.functions: list[str] = []

    def text(self) -> str | None:
        """Return the functions, and `forward`, which calls them; None where too little repeats."""
        while self.fold():
            pass
        if not self.functions:
            return None
        lines: list[Line] = []
        for is_call, group in groupby(self.statements, _is_call):
            run = [*group]
            lines += map(_line, run) if is_call else [self.part(run)]
        head = "def forward(run, draw_as, parameters, buffers, constants, inputs, device):"
        forward = [head, *map(ast.unparse, self.given), *lines_of(lines, lines[-1].reads)]
        return "\n\n".join([*self.functions, "\n    ".join(forward), ""])

    def fold(self) -> bool:
        """Put calls of a function in place of the repeated lines that save most, if there are any.

        What a call makes is of a kind of its own, so that calls are no repeated lines.
        """
        statements, draws = self.statements, self.draws
        found = fold_statements(
            statements, self.made, worth=_is_worth, kinds=self.kinds, numbers=draws
        )
        if found is None:
            return False
        stop = found.start + found.length * found.count
        body = statements[found.start : found.start + found.length]
        block = self.function(body, found.arguments, found.results)
        first = found.calls[0][2]
        calls = []
        for arguments, results, keys in found.calls:
            self.kinds.update((name, f"result {name}") for name in results)
            calls += [f"draw_as({keys}, {first})"] if keys else []
            calls += [_call(block, arguments, results)]
        calls += [f"draw_as({draws}, {draws})"] if first else []
        statements[found.start : stop] = ast.parse("\n".join(calls)).body
        return True

    def part(self, statements: Sequence[ast.stmt]) -> Line:
        """Make a function of lines that do not repeat, and return its call."""
        inside = dict.fromkeys(name for line in statements for name in names_made(line))
        read = dict.fromkeys(name for line in statements for name in names_read(line))
        arguments = [name for name in read if name in self.made and name not in inside]
        if isinstance(statements[-1], ast.Return):
            name = self.function(statements, arguments, None)
            return Line(f"return {_run(name, arguments)}", tuple(arguments), ())
        here = {id(line) for line in statements}
        others = [line for line in self.statements if id(line) not in here]
        wanted = {name for line in others for name in names_read(line)}
        results = [name for name in inside if name in wanted]
        name = self.function(statements, arguments, results)
        return _line(ast.parse(_call(name, arguments, results)).body[0])

    def function(
        self,
        statements: Sequence[ast.stmt],
        arguments: Iterable[str],
        results: Iterable[str] | None,
    ) -> str:
        """Write a function of some lines, and return its name. results: None where they return."""
        name = f"function_{len(self.functions) + 1}"
        lines = [ast.unparse(line) for line in statements]
        lines += [] if results is None else [f"return [{', '.join(results)}]"]
        body = textwrap.indent("\n".join(lines), "    ")
        given = ", ".join(dict.fromkeys([*arguments, "device"]))
        self.functions.append(f"def {name}({given}):\n{body}")
        return name


def _run(name: str, arguments: Iterable[str]) -> str:
    """Return a call of a function."""
    return f"run({', '.join(dict.fromkeys([name, *arguments, 'device']))})"


def _call(name: str, arguments: Iterable[str], results: Iterable[str]) -> str:
    """Return a line that calls a function."""
    return f"[{', '.join(results)}] = {_run(name, arguments)}"


def _line(statement: ast.stmt) -> Line:
    """Return a statement as a line of a program."""
    return Line(ast.unparse(statement), tuple(names_read(statement)), tuple(names_made(statement)))


def _is_call(statement: ast.stmt) -> bool:
    """Return whether a statement is a line of `forward`, and not yet in a function."""
    return ast.unparse(statement).startswith("draw_as(") or " = run(" in ast.unparse(statement)


def _is_given(statement: ast.stmt) -> bool:
    """Return whether a statement takes one of the program's arguments apart, or reads a size."""
    value = getattr(statement, "value", None)
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Attribute) and value.func.attr == "size"
    return isinstance(value, ast.Name)

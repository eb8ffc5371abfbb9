"""The functions of an emitted script: one for a rank's program, one for lines that repeat in it."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterable, Mapping

from autoparallel.plan import Plan
from autoparallel.rewrite.folded_source import Folded, fold_statements, values_made
from autoparallel.rewrite.program import Program, drops_copies
from autoparallel.view.words import Words, collective_text

__all__ = ["IMPORTS", "FunctionWriter"]

# How the file comes by the names that a program calls; see names_of in rewrite/program.py.
IMPORTS = {
    "F": "from torch.nn import functional as F",
    "functools": "import functools",
    "math": "import math",
    "kernels": "from autoparallel.runtime import kernels",
    "overlap": "from autoparallel.runtime import overlap",
    "rng": "from autoparallel.runtime import random_ops as rng",
    "convert": "from autoparallel.runtime.collectives import convert",
    "move": "from autoparallel.runtime.collectives import convert_fixed as move",
    "pending_sum": "from autoparallel.runtime.collectives import pending_sum",
    "convert_again": "from autoparallel.runtime.recompute import convert_again",
    "begin": "from autoparallel.runtime.flights import begin",
    "end": "from autoparallel.runtime.flights import end",
    "end_again": "from autoparallel.runtime.recompute import end_again",
    "parts_are_alike": "from autoparallel.runtime.recompute import parts_are_alike",
    "recomputed": "from autoparallel.runtime.recompute import recomputed",
    "remade": "from autoparallel.runtime.recompute import remade",
    "part": "from autoparallel.rewrite.program import part",
}
_PRODUCTS = {"linear", "mm"}
_CONVERSIONS = {"convert", "move", "convert_again", "begin"}
_LINE = 98


class FunctionWriter:
    """Writes one program's function, and the function of its repeated lines.

    used: the names that the text reads and does not make.
    """

    def __init__(
        self, plan: Plan, program: Program, name: str, axes: Iterable[tuple[str, int]]
    ) -> None:
        self.program, self.name = program, name
        self.words = Words(plan)
        self.conversions = {c.value: c for c in plan.conversions}
        function = ast.parse(program.source).body[0]
        assert isinstance(function, ast.FunctionDef)
        self.headers = [s for s in function.body if _header(s)]
        body = [s for s in function.body if not _header(s) and not isinstance(s, ast.Delete)]
        self.statements, self.last = body[:-1], body[-1]
        self.paths: dict[str, str] = {}
        for statement in self.headers:
            source = statement.value.id  # type: ignore[attr-defined]
            if source == "parameters":
                targets = statement.targets[0].elts  # type: ignore[attr-defined]
                self.paths = {
                    target.id: path
                    for target, path in zip(targets, program.parameters, strict=True)
                }
        self.used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)} & {
            *program.names,
            *IMPORTS,
        }

    def text(self) -> str:
        """Return the functions as text."""
        made = values_made([*self.statements, *self.headers])
        folded = fold_statements([*self.statements, self.last], made, self.is_module)
        functions = []
        lines = ["parameters = dict(zip(PARAMETERS, parameters, strict=True))"]
        for statement in self.headers:
            if statement.value.id != "parameters":  # type: ignore[attr-defined]
                lines += self.lines(statement)
        if folded is None:
            for statement in self.statements:
                lines += self.lines(statement)
        else:
            block, prefixes = self.block(folded)
            functions.append(block)
            for statement in self.statements[: folded.start]:
                lines += self.lines(statement)
            lines += self.calls(folded, prefixes)
            for statement in self.statements[folded.start + folded.length * folded.count :]:
                lines += self.lines(statement)
        lines += self.lines(self.last)
        arguments = "parameters, buffers, constants, inputs, device"
        body = textwrap.indent("\n".join(lines), "    ")
        doc = '    """Return this rank\'s outputs, and the values to write to buffers."""'
        functions.append(f"def {self.name}({arguments}):\n{doc}\n{body}")
        if drops_copies(self.program.source):
            functions.append(f"{self.name} = dropping({self.name})")
        return "\n\n\n".join(functions)

    def is_module(self, folded: Folded) -> bool:
        """Return whether each group has the parameters of one module: a block of the model."""
        prefixes = self._prefixes(folded)
        return prefixes is not None and len(set(prefixes)) == len(prefixes) and "" not in prefixes

    def block(self, folded: Folded) -> tuple[str, list[str] | None]:
        """Return the function of the repeated lines; and the paths of the blocks, where all
        parameters of a block are below one.
        """
        prefixes = self._prefixes(folded)
        names = dict(self.paths)
        arguments = [name for name in folded.arguments if name not in self.paths]
        if prefixes is not None:
            for name in folded.arguments:
                if name in self.paths:
                    names[name] = self.paths[name].removeprefix(prefixes[0])
        else:
            arguments = list(folded.arguments)
        lines: list[str] = []
        for statement in folded.body:
            lines += self.lines(
                statement, None if prefixes is None else ("at", names), prefixes is None
            )
        numbers = [f"n{index}" for index in range(folded.numbers)]
        given = ["parameters", "at"] if prefixes is not None else []
        head = f"def {self.name}_block({', '.join([*given, *arguments, *numbers, 'device'])}):"
        returned = ", ".join(folded.results)
        doc = f'    """Return {returned} of one of {folded.count} blocks that are alike."""'
        body = textwrap.indent("\n".join([*lines, f"return {returned}"]), "    ")
        if len(doc) > _LINE:
            doc = f'    """Return the results of one of {folded.count} blocks that are alike."""'
        return f"{head}\n{doc}\n{body}", prefixes

    def calls(self, folded: Folded, prefixes: list[str] | None) -> list[str]:
        """Return a line for each block: its call."""
        lines = []
        for index, (arguments, results, numbers) in enumerate(folded.calls):
            if prefixes is not None:
                given = ["parameters", repr(prefixes[index])]
                given += [name for name in arguments if name not in self.paths]
            else:
                given = [self.parameter(name) for name in arguments]
            given += [*map(str, numbers), "device"]
            lines.append(f"{', '.join(results)} = {self.name}_block({', '.join(given)})")
        return lines

    def _prefixes(self, folded: Folded) -> list[str] | None:
        """Return the paths, with a dot, below which the parameters of each block are; None where
        blocks share parameters, or call them differently.
        """
        rows = [
            [self.paths[name] for name in arguments if name in self.paths]
            for arguments, _, _ in folded.calls
        ]
        if not rows[0]:
            return None
        prefixes = []
        for row in rows:
            parts = [path.split(".")[:-1] for path in row]
            common = 0
            while all(len(p) > common and p[common] == parts[0][common] for p in parts):
                common += 1
            prefixes.append(".".join(parts[0][:common]) + ".")
        tails = [
            [path.removeprefix(prefix) for path in row]
            for row, prefix in zip(rows, prefixes, strict=True)
        ]
        return prefixes if all(tail == tails[0] for tail in tails) else None

    def parameter(self, name: str) -> str:
        """Return how a value is read: a parameter by its path."""
        return f"parameters[{self.paths[name]!r}]" if name in self.paths else name

    def lines(
        self,
        statement: ast.stmt,
        below: tuple[str, Mapping[str, str]] | None = None,
        as_given: bool = False,
    ) -> list[str]:
        """Return a statement's lines, with a comment where it redistributes a value.

        below: the name of the path of a block, and the paths of parameters below it. as_given: a
        parameter is an argument, and read by its own name.
        """
        comment = self.comment(statement)
        paths = {} if as_given else self.paths
        text = ast.unparse(_Parameters(paths, below).visit(ast.parse(ast.unparse(statement))))
        return [*([f"# {comment}"] if comment else []), *text.splitlines()]

    def comment(self, statement: ast.stmt) -> str:
        """Return what a redistribution is for, "" for other statements."""
        if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Call):
            return ""
        call = statement.value
        function = call.func.attr if isinstance(call.func, ast.Attribute) else (
            call.func.id if isinstance(call.func, ast.Name) else ""
        )  # fmt: skip
        target = statement.targets[0]
        inside = any(keyword.arg == "group" for keyword in call.keywords)
        if function in _CONVERSIONS and isinstance(call.args[0], ast.Name):
            value = call.args[0].id
        elif function in _PRODUCTS and inside and isinstance(target, ast.Name):
            # The result is redistributed within the product: it is called VALUE_PLACEMENT.
            value = target.id.rpartition("_")[0]
        else:
            return ""
        conversion = self.conversions.get(value)
        if conversion is None:
            return ""
        sent = self.words.sent(conversion)
        kinds = [
            f"{collective_text(item.collective)} {item.phase}"
            for item in sent
            if item.collective is not None
        ]
        readers = [r for r in conversion.readers if r != "return"]
        roles = []
        for op in self.words.plan.ops:
            if op.name in readers:
                role = self.words.role(op)
                roles.append(f"{op.name}{f' ({role})' if role else ''}")
        why = f"for {', '.join(roles[:3])}{' and others' if len(roles) > 3 else ''}" if roles else (
            "to be returned"
        )  # fmt: skip
        change = self.words.change(conversion)
        return f"{', '.join(dict.fromkeys(kinds)) or 'nothing is sent'}: {change}, {why}"


class _Parameters(ast.NodeTransformer):
    """Reads parameters by their paths. below: see FunctionWriter.lines."""

    def __init__(
        self, paths: Mapping[str, str], below: tuple[str, Mapping[str, str]] | None
    ) -> None:
        self.paths, self.below = paths, below

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Return the look-up of a parameter, or the name as it is."""
        if node.id not in self.paths:
            return node
        key: ast.expr = ast.Constant(self.paths[node.id])
        if self.below is not None and self.below[1][node.id] != self.paths[node.id]:
            tail = ast.Constant(self.below[1][node.id])
            key = ast.BinOp(ast.Name(self.below[0], ast.Load()), ast.Add(), tail)
        return ast.Subscript(ast.Name("parameters", ast.Load()), key, ast.Load())


def _header(statement: ast.stmt) -> bool:
    """Return whether a statement unpacks one of the function's arguments."""
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Name):
        return False
    return statement.value.id in ("parameters", "buffers", "constants", "inputs")

"""A plan as a Python file of its own: the program of a rank, to be read, changed and run.

The file needs torch and the runtime of this package (conversions, kernels that communicate), and
neither the model nor the planner. It has the user's names: parameters are read by their paths.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from autoparallel.errors import PlanError
from autoparallel.exports.export_text import Export
from autoparallel.exports.folded_source import Folded, fold_statements
from autoparallel.graph.captured import Captured
from autoparallel.placement import Placement, layout_text
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import emit
from autoparallel.rewrite.emitted_program import require_graph
from autoparallel.rewrite.program import Program, drops_copies
from autoparallel.runtime.groups import Group
from autoparallel.runtime.ranks import absent_ranks
from autoparallel.support.units import seconds_text
from autoparallel.view.words import Words, collective_text

__all__ = ["emitted_script"]

_MOST_NUMBERS = 10_000  # of a tensor that is written into the file
# How the file comes by the names that a program calls; see names_of in rewrite/program.py.
_IMPORTS = {
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
    "parts_are_alike": "from autoparallel.runtime.recompute import parts_are_alike",
    "recomputed": "from autoparallel.runtime.recompute import recomputed",
    "remade": "from autoparallel.runtime.recompute import remade",
    "part": "from autoparallel.rewrite.program import part",
}
# In a program that drops copies the others have memory of their own.
_BESIDE = {
    "convert": "from autoparallel.runtime.recompute import convert_beside as convert",
    "move": "from autoparallel.runtime.recompute import move_beside as move",
}
_PRODUCTS = {"linear", "mm"}
_CONVERSIONS = {"convert", "move", "convert_again"}
_LINE = 98
_INDEXED = re.compile(r"(.*?)\.(\d+)\.(.+)")  # of a path: before, at and after its first index

_HEAD = '''"""{model} on {world_size} ranks, {mesh}: the program that each of them runs.

    torchrun --nproc-per-node {world_size} {file} weights.pt

runs one step on inputs of zeros; without weights.pt they are drawn at random. To train with it:

    from {module} import sharded_model
    model = sharded_model(torch.load("weights.pt"))      # whole tensors, by the names below
    loss = model({inputs})[0]
    loss.backward()
    model.finish_gradients()

Every rank is given the same, whole inputs: {inputs}. It returns {returned}.
Written by autoparallel from a plan; predicted: {seconds} a step on {hardware}.{missing}
"""
'''
_TAIL = '''

def sharded_model(weights):
    """Return this rank's module. weights: whole tensors by path, such as a state_dict."""
    return ShardedProgram(globals(), {{**EMBEDDED, **weights}})


def main():
    """Run one step, and print what is returned first."""
    if len(sys.argv) > 1:
        weights = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
    else:
        torch.manual_seed(0)
        shapes = {{path: row[2:] for path, row in PARAMETERS.items()}} | BUFFER_SHAPES
        weights = {{p: (torch.randn(s) * 0.02).to(dtype) for p, (s, dtype) in shapes.items()}}
    model = sharded_model(weights)
    inputs = [torch.zeros(shape, dtype=dtype) for shape, dtype in INPUTS]
    first = model(*inputs)[0]
    if first.requires_grad and not first.shape:
        first.backward()
        model.finish_gradients()
    if model.ranks.rank == 0:
        print(first.item() if not first.shape else tuple(first.shape))


if __name__ == "__main__":
    main()
'''


def emitted_script(plan: Plan, model: nn.Module, *, file: str = "sharded_model.py") -> Export:
    """Return a Python file that runs a plan without the model and without the planner.

    plan: with its graph. model: the one that was planned, with values for buffers that its
    state_dict does not have. file: the name of the file, for its own words. Lines that repeat are
    one function, parameters are read by their paths, and each redistribution has a comment that
    says what it is for. Ranks whose parts differ in size have programs of their own in the file.
    Raises PlanError for a plan in parts, and for objects that no text can stand for.

    Example: `Path("sharded_gpt.py").write_text(emitted_script(plan, model).text)`
    """
    if plan.breaks:
        raise PlanError(
            f"the plan for {plan.model} has parts, between which runs the user's Python",
            fix="export the plan of one part for its module: plan.parts[0].plan",
        )
    captured = require_graph(plan)
    programs = _programs(plan, captured)
    first = programs[0][0]
    missing = _missing(plan, first)
    functions, used = [], set()
    for program, numbers in programs:
        name = "forward" if len(programs) == 1 else f"forward_{numbers[0]}"
        writer = _Writer(plan, program, name, plan.mesh.axes)
        functions.append(writer.text())
        used |= writer.used
        functions += [f"forward_{other} = {name}" for other in numbers[1:] if len(programs) > 1]
    text = "\n".join(
        [
            _head(plan, missing, file),
            *_imports(first, used),
            "",
            *_tables(plan, first, model, captured.constants),
            "",
            "",
            "\n\n\n".join(functions),
            _TAIL.format(),
        ]
    )
    return Export("python", text, ".py", missing)


def _programs(plan: Plan, captured: Captured) -> list[tuple[Program, list[int]]]:
    """Return the programs that differ, each with the ranks that run it."""

    def of(rank: int) -> Program:
        return emit(captured.graph, plan, absent_ranks(plan.mesh, rank), plan.model)

    first, last = of(0), of(plan.world_size - 1)
    # Parts become no larger from rank to rank: where the first and the last are alike, all are.
    if first.source == last.source:
        return [(first, list(range(plan.world_size)))]
    programs: dict[str, tuple[Program, list[int]]] = {}
    for rank in range(plan.world_size):
        program = of(rank)
        programs.setdefault(program.source, (program, []))[1].append(rank)
    return list(programs.values())


def _head(plan: Plan, missing: tuple[str, ...], file: str) -> str:
    """Return the file's docstring."""
    inputs = ", ".join(item.path.replace(".", "_") for item in plan.inputs) or "none"
    notes = "".join(f"\n- {sentence}" for sentence in missing)
    return _HEAD.format(
        model=plan.model,
        world_size=plan.world_size,
        mesh=plan.mesh,
        file=file,
        module=file.removesuffix(".py"),
        inputs=inputs,
        returned=", ".join(name or "its result" for name in plan.returned) or "its results",
        seconds=seconds_text(plan.seconds),
        hardware=plan.hardware,
        missing=f" What it does not have of the plan:\n{notes}" if notes else "",
    )


def _missing(plan: Plan, program: Program) -> tuple[str, ...]:
    """Return what of a plan the file does not do."""
    missing = []
    late = [p.path for p in plan.parameters if p.state != p.storage or p.gradient != p.storage]
    if late:
        missing.append(
            f"ZeRO-1 and ZeRO-2 of {len(late)} parameters: their gradients and optimizer states "
            "are as large as the parameter is here"
        )
    libraries = sorted(set(re.findall(r"torch\.ops\.(\w+)\.", program.source)) - {"aten", "prims"})
    if libraries:
        missing.append(f"the registration of the custom ops of {', '.join(libraries)}: import it")
    return tuple(missing)


def _imports(program: Program, used: set[str]) -> list[str]:
    """Return the lines that import what the programs call. Raises PlanError for other objects."""
    drops = drops_copies(program.source)
    known = {**_IMPORTS, **(_BESIDE if drops else {})}
    lines = ["import sys", "", "import torch"]
    ours = [known[name] for name in known if name in used]
    placements = {n: v for n, v in program.names.items() if isinstance(v, Placement) and n in used}
    kinds = sorted({type(placement).__name__ for placement in placements.values()})
    if kinds:
        ours.append(f"from autoparallel.placement import {', '.join(kinds)}")
    if drops:
        ours.append("from autoparallel.runtime.recompute import dropping")
    ours.append("from autoparallel.runtime.sharded_program import ShardedProgram")
    rows = [f"{name} = {_placement_source(value)}" for name, value in sorted(placements.items())]
    standard = {"torch", "ranks", *_IMPORTS, *placements}
    for name, value in program.names.items():
        if name in standard or name not in used or isinstance(value, Group):
            continue
        module, qualified = getattr(value, "__module__", ""), getattr(value, "__qualname__", "")
        if not module or not qualified or "<" in qualified or "." in qualified:
            raise PlanError(
                f"the program calls {name}, {value!r:.80}, for which a file has no words",
                fix="apply the plan in Python: autoparallel.apply_plan(model, plan)",
            )
        ours.append(f"from {module} import {qualified} as {name}")
    return [
        *lines,
        *sorted(ours, key=lambda line: (not line.startswith("import"), line)),
        "",
        *rows,
    ]


def _placement_source(placement: Placement) -> str:
    """Return Python for a placement.

    >>> from autoparallel.placement import Shard
    >>> _placement_source(Shard(0)), _placement_source(Shard(1, blocks=3))
    ('Shard(0)', 'Shard(1, blocks=3)')
    """
    text = str(placement)
    names = {"S": "Shard", "I": "Invariant", "R": "Replicate", "P": "Partial"}
    return names[text[0]] + (text[1:] or "()")


def _tables(
    plan: Plan, program: Program, model: nn.Module, constants: Mapping[str, torch.Tensor]
) -> list[str]:
    """Return the tables that ShardedProgram reads, and those for a run with random weights."""
    named: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    stored = plan.storage
    axes = [name for name, value in program.names.items() if isinstance(value, Group)]
    lines = [f"MESH = {dict(plan.mesh.axes)!r}"]
    lines += ["# What the program calls the groups of ranks along these axes.", f"AXES = {axes!r}"]
    lines += [
        "# Of each parameter: how it lies on the ranks, how its gradient lies after the backward"
    ]
    lines += ["# pass, its whole shape, and its dtype."]
    rows = [
        (
            path,
            f"({layout_text(stored[path])!r}, {layout_text(gradient)!r}, "
            f"{tuple(named[path].shape)!r}, {named[path].dtype!r})",
        )
        for path, gradient in zip(program.parameters, program.gradients, strict=True)
    ]
    lines += ["PARAMETERS = {", *_folded_rows(rows), "}"]
    lines += [f"BUFFERS = {list(program.buffers)!r}"]
    lines += [f"WRITTEN = {list(program.mutations)!r}"]
    lines += [f"OUTPUTS = {[layout_text(layout) for layout, _ in program.outputs]!r}"]
    values = [_literal(path, constants[path]) for path in program.constants]
    lines += [f"CONSTANTS = [{', '.join(values)}]"]
    kept = model.state_dict()
    lines += ["# Buffers that a state_dict does not have.", "EMBEDDED = {"]
    lines += [
        f"    {path!r}: {_literal(path, buffers[path])},"
        for path in program.buffers
        if path not in kept
    ]
    whole = {path: buffers[path] for path in program.buffers if path in kept}
    lines += ["}", "# Shape and dtype of the buffers that it has.", "BUFFER_SHAPES = {"]
    lines += [f"    {p!r}: ({tuple(t.shape)!r}, {t.dtype!r})," for p, t in whole.items()]
    lines += ["}", f"INPUTS = [{', '.join(_input_rows(plan))}]"]
    return lines


def _folded_rows(rows: list[tuple[str, str]]) -> list[str]:
    """Return the lines of a table by paths, those of repeated blocks once.

    >>> _folded_rows([("a.0.b", "1"), ("a.1.b", "1"), ("c", "2")])[0]
    "    **{f'a.{index}.{name}': row for index in range(0, 2) for name, row in {"
    """
    lines: list[str] = []
    at = 0
    while at < len(rows):
        match = _INDEXED.fullmatch(rows[at][0])
        blocks: dict[int, list[tuple[str, str]]] = {}
        end = at
        while match and end < len(rows):
            other = _INDEXED.fullmatch(rows[end][0])
            if other is None or other[1] != match[1]:
                break
            blocks.setdefault(int(other[2]), []).append((other[3], rows[end][1]))
            end += 1
        first, count = next(iter(blocks), 0), len(blocks)
        alike = list(blocks) == list(range(first, first + count)) and all(
            block == blocks[first] for block in blocks.values()
        )
        if match is None or count < 2 or not alike:
            end = max(end, at + 1)
            lines += [f"    {path!r}: {row}," for path, row in rows[at:end]]
        else:
            key = f"f'{match[1]}.{{index}}.{{name}}'"
            span = f"range({first}, {first + count})"
            lines.append(f"    **{{{key}: row for index in {span} for name, row in {{")
            lines += [f"        {name!r}: {row}," for name, row in blocks[first]]
            lines.append("    }.items()},")
        at = end
    return lines


def _input_rows(plan: Plan) -> list[str]:
    """Return shape and dtype of each input that a run with zeros makes."""
    graph = require_graph(plan).graph
    nodes = [node for node in graph.nodes if node.kind == "input"]
    return [
        f"({item.given!r}, {node.result.dtype!r})"
        for item, node in zip(plan.inputs, nodes, strict=True)
    ]


def _literal(path: str, tensor: torch.Tensor) -> str:
    """Return Python for a tensor. Raises PlanError for one that is too large, or has no values."""
    if tensor.is_meta or tensor.numel() > _MOST_NUMBERS:
        raise PlanError(
            f"{path} has "
            + ("no values" if tensor.is_meta else f"{tensor.numel()} elements")
            + ", and would have to be written into the file",
            why="it is neither in the model's state_dict nor computed by the program",
            fix="give a model with weights, in place of one on the meta device"
            if tensor.is_meta
            else "register it as a persistent buffer of the model",
        )
    # What is not finite prints as a name that Python does not have.
    numbers = re.sub(r"-?\b(?:inf|nan)\b", r"float('\g<0>')", repr(tensor.tolist()))
    return f"torch.tensor({numbers}, dtype={tensor.dtype!r})"


class _Writer:
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
            *_IMPORTS,
        }

    def text(self) -> str:
        """Return the functions as text."""
        made = {
            node.id
            for statement in [*self.statements, *self.headers]
            for node in ast.walk(statement)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        made |= {s.name for s in self.statements if isinstance(s, ast.FunctionDef)}
        folded = fold_statements(self.statements, made, self.is_module)
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
    """Reads parameters by their paths. below: see _Writer.lines."""

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

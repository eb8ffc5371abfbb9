"""A rank's emitted program as a torch.fx.GraphModule, its collectives being nodes like all others.

The program's text is read statement by statement: what works on tensors or on the inputs' sizes
becomes a node, everything else is computed at once. Groups of ranks and placements, which torch.fx
cannot write as text, are attributes of the module that nodes read.
"""

from __future__ import annotations

import ast
import builtins
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from autoparallel.errors import PlanError
from autoparallel.graph.interop import FxBuilder
from autoparallel.rewrite.program import Program

__all__ = ["program_module"]

# Types of arguments that torch.fx writes as text.
_PLAIN = (
    int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout,
    torch.memory_format,
)  # fmt: skip
# The submodule in which groups, placements and blocks are.
_OBJECTS = "program_objects"
_BINARY: Mapping[type[ast.operator], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARED: Mapping[type[ast.cmpop], Callable[..., Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
# Python 3.11 counts the depth of all trees that threads parse at a time in one place, and raises
# SystemError where two of them meet; ranks may be threads.
_parsing = threading.Lock()
# Functions of Python that a program may call on numbers: computed at once where all are known.
_PURE = ("builtins", "math", "functools", "autoparallel.rewrite.program")


def program_module(
    program: Program,
    parameters: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    constants: Mapping[str, torch.Tensor],
    device: torch.device,
    name: str,
) -> fx.GraphModule:
    """Return the program as a GraphModule: flat tensors in, a tuple of the rank's outputs out.

    parameters, buffers, constants: the rank's parts by path, shared with the module. device: where
    they are. name: of the GraphModule's class. Buffers that the program writes to are written when
    it is called. Values have the names that they have in the text. Copies that the program drops,
    to gather them again in the backward pass, are saved here.
    Raises PlanError for a statement that has no form in torch.fx.
    """
    with _parsing:
        function = ast.parse(program.source).body[0]
    assert isinstance(function, ast.FunctionDef)
    paths = (*program.parameters, *program.buffers, *program.constants)
    # A model may have a submodule of that name.
    home = _OBJECTS
    while any(path.partition(".")[0] == home for path in paths):
        home += "_"
    # The device is known when the module is made, and is written into the graph as it is.
    reader = _Reader(program.names, _assigned(function), {"device": device}, home)
    held = {
        "parameters": (program.parameters, parameters),
        "buffers": (program.buffers, buffers),
        "constants": (program.constants, constants),
    }
    # torch.fx wants inputs first.
    unpacked = [s for s in function.body if _unpacked(s) is not None]
    for statement in sorted(unpacked, key=lambda s: _unpacked(s) != "inputs"):
        source = _unpacked(statement)
        assert source is not None
        for index, value in enumerate(_targets(statement)):
            if source == "inputs":
                reader.known[value] = reader.builder.add("placeholder", value, name=value)
            else:
                path = held[source][0][index]
                reader.stored(value, path, held[source][1][path], path in program.mutations)
    rest = [statement for statement in function.body if statement not in unpacked]
    outputs, written = reader.run(rest)
    for path, value in zip(program.mutations, written, strict=True):
        reader.builder.write_back(reader.written[path], value)
    return reader.builder.module(outputs, name)


def _unpacked(statement: ast.stmt) -> str | None:
    """Return "parameters" for `[a, b] = parameters` and the like, None for other statements.

    Each of the function's arguments that are lists is unpacked by one such statement.
    """
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Name):
        return None
    source = statement.value.id
    return source if source in ("parameters", "buffers", "constants", "inputs") else None


def _targets(statement: ast.stmt) -> list[str]:
    """Return the names that an assignment gives values to, in order."""
    assert isinstance(statement, ast.Assign)
    (target,) = statement.targets
    items = target.elts if isinstance(target, (ast.List, ast.Tuple)) else [target]
    return [item.id for item in items if isinstance(item, ast.Name)]


def _assigned(function: ast.FunctionDef) -> Iterator[str]:
    """Yield every name that the function, or a block in it, gives a value to, and the blocks'."""
    for inner in ast.walk(function):
        if isinstance(inner, ast.Assign):
            yield from _targets(inner)
        elif isinstance(inner, ast.FunctionDef) and inner is not function:
            yield inner.name
            yield from (argument.arg for argument in inner.args.args)


class _Reader:
    """An interpreter of one function of the program, which builds a torch.fx graph.

    names: see Program. reserved: names that nodes must not take, because the text uses them. known:
    the values of the function's names so far, nodes or plain objects. home: the submodule for what
    torch.fx cannot write. written: the nodes of the buffers that are written back, by path.
    objects: the nodes of objects in `home`, by id. blocks: the modules of recomputed blocks, and
    the names that each reads from around it, by the block's name.
    """

    def __init__(
        self,
        names: Mapping[str, Any],
        reserved: Iterator[str],
        known: Mapping[str, Any],
        home: str,
    ) -> None:
        self.names, self.home = names, home
        self.reserved = list(reserved)
        self.builder = FxBuilder(self.reserved)
        self.known: dict[str, Any] = dict(known)
        self.written: dict[str, Any] = {}
        self.objects: dict[int, Any] = {}
        self.blocks: dict[str, tuple[Any, tuple[str, ...]]] = {}

    def stored(self, value: str, path: str, tensor: torch.Tensor, is_written: bool) -> None:
        """Make `value` the attribute at `path`, or a copy of it where the program writes to it.

        The parallel module copies such buffers, too: autograd has saved the value of before.
        """
        if not is_written:
            self.known[value] = self.builder.attribute(path, tensor, value)
            return
        whole = self.builder.attribute(path, tensor, self.builder.fresh(f"{value}_stored"))
        self.written[path] = whole
        copied = self.builder.add(
            "call_function", torch.ops.aten.clone.default, (whole,), name=value
        )
        self.known[value] = copied

    def run(self, statements: list[ast.stmt]) -> Any:
        """Interpret the statements, and return what the last of them returns."""
        for statement in statements:
            if isinstance(statement, ast.Return):
                assert statement.value is not None
                return self.value(statement.value)
            if isinstance(statement, ast.Assign):
                self.assign(statement)
            elif isinstance(statement, ast.FunctionDef):
                self.block(statement)
            elif not isinstance(statement, ast.Delete):  # torch.fx frees what is not read again
                raise _no_form(statement)
        raise AssertionError("a program returns")

    def assign(self, statement: ast.Assign) -> None:
        """Interpret an assignment to a name, or to a list of names."""
        names = _targets(statement)
        if isinstance(statement.targets[0], ast.Name):
            self.known[names[0]] = self.value(statement.value, names[0])
            return
        several = self.value(statement.value)
        for index, name in enumerate(names):
            # The program calls everything so that nobody reads.
            if name == "_":
                continue
            part = several
            if isinstance(several, fx.Node):
                part = self.builder.add(
                    "call_function", operator.getitem, (several, index), name=name
                )
            elif isinstance(several, (list, tuple)):
                part = several[index]
            self.known[name] = part

    def block(self, function: ast.FunctionDef) -> None:
        """Make a module of a function in the program, which is a block that is recomputed.

        A GraphModule sees nothing of what is around it: what the function reads from there is
        passed to it besides its arguments.
        """
        arguments = [argument.arg for argument in function.args.args]
        local = {*arguments, *_assigned(function)}
        outer = [
            inner.id
            for inner in ast.walk(function)
            if isinstance(inner, ast.Name)
            and inner.id not in local
            and isinstance(self.known.get(inner.id), fx.Node)
        ]
        free = tuple(dict.fromkeys(outer))
        rest = {name: value for name, value in self.known.items() if not isinstance(value, fx.Node)}
        reader = _Reader(self.names, iter((*self.reserved, *local)), rest, self.home)
        for name in (*arguments, *free):
            reader.known[name] = reader.builder.add("placeholder", name, name=name)
        module = reader.builder.module(reader.run(function.body), function.name)
        self.blocks[function.name] = (module, free)

    def value(self, expression: ast.expr, name: str = "") -> Any:
        """Return the value of an expression: a node, or a plain object that is known at once.

        name: of the node, if there is to be one. Raises PlanError for an expression that programs
        do not have.
        """
        if isinstance(expression, ast.Constant):
            return expression.value
        if isinstance(expression, ast.Name):
            return self.named(expression.id)
        if isinstance(expression, ast.Attribute):
            return getattr(self.value(expression.value), expression.attr)
        if isinstance(expression, (ast.List, ast.Tuple)):
            items = [self.value(item) for item in expression.elts]
            return items if isinstance(expression, ast.List) else tuple(items)
        if isinstance(expression, ast.Dict) and None not in expression.keys:
            pairs = zip(expression.keys, expression.values, strict=True)
            return {self.value(key): self.value(item) for key, item in pairs if key is not None}
        if isinstance(expression, ast.Call):
            return self.call(expression, name)
        if isinstance(expression, ast.BinOp) and type(expression.op) in _BINARY:
            sides = (self.value(expression.left), self.value(expression.right))
            return self.computed(_BINARY[type(expression.op)], sides, {}, name)
        if isinstance(expression, ast.UnaryOp) and isinstance(expression.op, ast.USub):
            return self.computed(operator.neg, (self.value(expression.operand),), {}, name)
        if isinstance(expression, ast.Compare) and len(expression.ops) == 1:
            sides = (self.value(expression.left), self.value(expression.comparators[0]))
            return self.computed(_COMPARED[type(expression.ops[0])], sides, {}, name)
        raise _no_form(expression)

    def named(self, name: str) -> Any:
        """Return the value of a name, as Python would look it up."""
        for scope in (self.known, self.names, vars(builtins)):
            if name in scope:
                return scope[name]
        raise AssertionError(f"{name} is not known to the program")

    def call(self, expression: ast.Call, name: str) -> Any:
        """Return the value of a call: of a block, of a tensor's method, or of a function."""
        keywords = {k.arg: self.value(k.value) for k in expression.keywords if k.arg is not None}
        function = expression.func
        first = expression.args[0] if expression.args else None
        if isinstance(first, ast.Name) and first.id in self.blocks:
            block, free = self.blocks[first.id]
            path = f"{self.home}.{first.id}"
            at = self.builder.attribute(path, block, self.builder.fresh(f"{first.id}_module"))
            inputs = [self.value(item) for item in expression.args[1:]]
            inputs += [self.known[other] for other in free]
            return self.computed(self.value(function), (at, *inputs), keywords, name)
        args = tuple(self.value(item) for item in expression.args)
        if isinstance(function, ast.Attribute):
            # `x.sum()` of a node is a method; `torch.sum` is an attribute of a plain object.
            owner = self.value(function.value)
            if isinstance(owner, fx.Node):
                arguments = self.lifted((owner, *args)), self.lifted(keywords)
                return self.builder.add("call_method", function.attr, *arguments, name=name)
        return self.computed(self.value(function), args, keywords, name)

    def computed(
        self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str
    ) -> Any:
        """Return the result of a call of numbers that are known, and a node for any other call."""
        pure = getattr(function, "__module__", None) in (*_PURE, "_operator")
        if pure and not _has_node((args, kwargs)):
            return function(*args, **kwargs)
        arguments = self.lifted(args), self.lifted(dict(kwargs))
        return self.builder.add("call_function", function, *arguments, name=name)

    def lifted(self, item: Any) -> Any:
        """Return an argument in which everything is plain or a node, so that torch.fx can write it.

        Other objects become attributes of the module, each once, under the name that the text has.
        """
        if isinstance(item, (fx.Node, *_PLAIN)):
            return item
        if isinstance(item, (list, tuple)):
            return type(item)(self.lifted(part) for part in item)
        if isinstance(item, dict):
            return {key: self.lifted(part) for key, part in item.items()}
        if id(item) not in self.objects:
            known = [name for name, value in self.names.items() if value is item]
            plain = getattr(item, "__name__", type(item).__name__)
            name = self.builder.fresh(known[0] if known else plain)
            self.objects[id(item)] = self.builder.attribute(f"{self.home}.{name}", item, name)
        return self.objects[id(item)]


def _has_node(item: Any) -> bool:
    """Return whether there is a node in nested lists, tuples and dicts."""
    if isinstance(item, (list, tuple)):
        return any(map(_has_node, item))
    if isinstance(item, dict):
        return any(map(_has_node, item.values()))
    return isinstance(item, fx.Node)


def _no_form(part: ast.AST) -> PlanError:
    """Return the error for a part of the text that this file does not know."""
    return PlanError(
        f"the emitted program has no form in torch.fx: {ast.unparse(part)}",
        why="only the statements that programs are known to consist of are translated",
        fix="read the program as text: autoparallel.emitted_program(plan)",
    )

"""Variables that a loop changes and that are read in a later turn, or after it.

A loop that is traced with more turns than a call has may count them, remember the last one or list
them in Python, where no graph shows it. What a turn leaves in variables is compared with what was
there before; the code says which of them are read again before they are set.
"""

from __future__ import annotations

import collections
import dis
import inspect
import types
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import nn

from autoparallel.capture.module_tensors import MODULE_ATTRIBUTES
from autoparallel.graph.attribute_read import SIMPLE
from autoparallel.support.object_state import moves_on, own_attributes, random_state

__all__ = ["LoopVariables", "loop_at"]

_ENDS = ("RETURN", "RAISE", "RERAISE", "JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_ABSOLUTE")
_OTHERS = ("torch", "sympy", "autoparallel")
_DEEPEST = 4  # containers and objects inside of others that are looked into


class LoopVariables:
    """The variables of a function in which a loop begins, as far as they are read again.

    frame: of the function. head: the offset of the instruction that begins each turn.

    Example: `variables = LoopVariables(frame, head)`, and `variables.changed()` after a turn.
    """

    def __init__(self, frame: types.FrameType, head: int) -> None:
        self.frame = frame
        self.names = _read_again(frame.f_code, head)
        # What is compared by identity has to live as long.
        self.held: list[Any] | None = []
        self.before = self.state()
        self.hold, self.held = self.held, None

    def state(self) -> dict[str, Any]:
        """Return what the variables are, as values that can be compared."""
        variables = self.frame.f_locals
        return {
            name: self.seen(variables[name]) for name in sorted(self.names) if name in variables
        }

    def changed(self) -> str:
        """Return the name of a variable that is another one now; "" if there is none."""
        now = self.state()
        for name in sorted(self.before.keys() | now.keys()):
            if name not in self.before or name not in now or self.before[name] != now[name]:
                return name
        return ""

    def seen(self, value: Any, depth: int = 0) -> Any:
        """Return something that is equal as long as a value is the same, and has the same in it."""
        if isinstance(value, SIMPLE):
            return type(value), repr(value)
        if self.held is not None:
            self.held.append(value)
        inner: Any = ()
        package = type(value).__module__.partition(".")[0]
        if package == "numpy" and hasattr(value, "tobytes"):
            return id(value), value.tobytes()
        # Such as sizes that are symbols, which know all that is known of symbols.
        known = package in _OTHERS and not isinstance(value, nn.Module)
        if known or isinstance(value, type | types.ModuleType | types.FunctionType):
            return id(value)
        state = random_state(value)
        if state is not None:
            return id(value), state[0]
        if moves_on(value):
            return object()
        if depth < _DEEPEST:
            if isinstance(value, dict):
                inner = value.items()
            elif isinstance(value, list | tuple | set | frozenset | collections.deque):
                inner = value
            else:
                own = own_attributes(value)
                module = isinstance(value, nn.Module)
                inner = [pair for pair in own.items() if not (module and pair[0] in _OF_MODULES)]
        items = tuple(self.seen(item, depth + 1) for item in inner)
        # Tuples are made anew where they are handed on.
        return type(value) if isinstance(value, tuple) else id(value), items


_OF_MODULES = frozenset(MODULE_ATTRIBUTES)


def loop_at(frame: types.FrameType) -> int | None:
    """Return the offset at which each turn of a `for` begins that a frame is about to enter.

    None where it is at no such loop: in a comprehension, or in a generator, which other code runs
    between its turns.
    """
    flags = frame.f_code.co_flags
    if not flags & inspect.CO_OPTIMIZED or flags & (
        inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
    ):
        return None
    steps = [step for step in dis.get_instructions(frame.f_code) if step.opname != "EXTENDED_ARG"]
    for step, after in pairwise(steps):
        if step.offset == frame.f_lasti:
            loop = step.opname == "GET_ITER" and after.opname == "FOR_ITER"
            return after.offset if loop else None
    return None


def _read_again(code: types.CodeType, start: int) -> set[str]:
    """Return the variables that are read from an offset on before they are set, on some way.

    Variables that functions inside share are among them, as these may be called at any time.
    """
    bytecode = dis.Bytecode(code)
    steps = list(bytecode)
    places = {step.offset: index for index, step in enumerate(steps)}
    following: list[set[int]] = []
    for index, step in enumerate(steps):
        ways = set() if step.opname.startswith(_ENDS) else {index + 1}
        if step.opcode in dis.hasjrel or step.opcode in dis.hasjabs:
            ways.add(places[step.argval])
        following.append({way for way in ways if way < len(steps)})
    for entry in bytecode.exception_entries:  # type: ignore[attr-defined]
        for index, step in enumerate(steps):
            if entry.start <= step.offset < entry.end:
                following[index].add(places[entry.target])
    live: list[set[str]] = [set() for _ in steps]
    moved = True
    while moved:
        moved = False
        for index in reversed(range(len(steps))):
            now = set[str]().union(*(live[way] for way in following[index]))
            for name, reads in reversed(list(_uses(steps[index]))):
                now = now | {name} if reads else now - {name}
            if now != live[index]:
                live[index], moved = now, True
    return live[_head(steps, places[start])] | {*code.co_cellvars, *code.co_freevars}


def _head(steps: list[dis.Instruction], index: int) -> int:
    """Return where an instruction begins, with what extends its argument."""
    while index and steps[index - 1].opname == "EXTENDED_ARG":
        index -= 1
    return index


def _uses(step: dis.Instruction) -> Iterator[tuple[str, bool]]:
    """Yield the local variables of an instruction in order, each with whether it is read."""
    if "_FAST" not in step.opname:
        return
    names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
    parts = [part for part in step.opname.split("_") if part in ("LOAD", "STORE", "DELETE")]
    for name, part in zip(names, parts, strict=False):
        yield name, part == "LOAD"

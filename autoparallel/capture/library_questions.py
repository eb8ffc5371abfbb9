"""Questions to libraries that stand in a forward's code: `sys.argv`, `gc.isenabled()`.

A library's own settings are no variables of the user's, and there are too many to look at all. What
code asks by a fixed way, from a name to attributes to a call without arguments or with constant
ones, can be asked again at each call of the model. Functions are asked alone that are called as
questions are; what they answer must be plain.
"""

from __future__ import annotations

import dis
import functools
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from autoparallel.graph.attribute_read import (
    ABSENT,
    SIMPLE,
    Answer,
    AttributeRead,
    Contents,
    Where,
    kept_of,
)
from autoparallel.support.torch_private import COMPILER

__all__ = ["Question", "asked_by_identity", "compares_objects", "names_looked_up"]
__all__ += ["questions_in", "ways_in"]

# A step is ("attribute", name) or ("call", constant arguments); a way begins with a name.
Step = tuple[str, Any]
Way = tuple[str, tuple[Step, ...]]
_ASKING = re.compile(r"^(is|are|get|has|current|active|exc_info)|(enabled|count|err)$")
# Their answers stay as they are, are another thing in each call, or take long; those of autocast
# are known of each call, and draws are no questions.
_NOT_ASKED = (
    *("torch.cuda", "torch.xpu", "torch.mps", "torch.mtia", "torch.accelerator"),
    *("torch.distributed", "torch.version", COMPILER, "torch.autograd"),
    *("random", "secrets", "numpy.random.mtrand", "getpass", "os", "posix", "time", "inspect"),
    "builtins",
)
_WATCHED = ("autocast", "grad_enabled", "is_compiling", "is_exporting", "is_dynamo_compiling")
_NUMBERS = ("math", "cmath", "numpy")  # their numbers are constants
# Kinds of values that are no settings: types of tensors, devices.
_MOST = 32  # items of a container that is an answer
_KINDS = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_ABSENCE = frozenset(("getattr", "hasattr", "attrgetter", "methodcaller"))
_SKIPPED = frozenset(("CACHE", "EXTENDED_ARG", "PUSH_NULL", "PRECALL", "NOP", "RESUME"))
_NAMES = ("LOAD_GLOBAL", "LOAD_NAME")


class Question:
    """One question with its answer as it is now. text: as it stands in the code.

    ask: asks again. value: the answer. is_plain: whether a later answer can be compared with it.
    """

    def __init__(self, text: str, ask: Callable[[], Any], value: Any) -> None:
        self.text, self.ask, self.value = text, ask, value
        container = isinstance(value, (list, dict)) and len(value) <= _MOST
        self.is_plain = isinstance(value, SIMPLE) or Contents.fit(value) or container

    def read(self) -> AttributeRead:
        """Return the question as a read, by which each call asks again."""
        route = (("cell", Answer(self.ask)),)
        return AttributeRead("", route, self.text, Where.ENCLOSED, kept_of(self.value))


def questions_in(
    code: types.CodeType, variables: Mapping[str, Any], is_library: Callable[[str], bool]
) -> Iterator[Question]:
    """Yield the questions in code. variables: its global ones.

    is_library: whether a Python module is a library's whose settings are looked at here alone.

    >>> import gc
    >>> [question.text for question in questions_in(
    ...     (lambda: (sys.argv, gc.isenabled(), gc.collect())).__code__,
    ...     {"sys": sys, "gc": gc}, lambda name: True)]
    ['sys.argv', 'gc.isenabled()']
    """
    texts = _texts_in(code)
    absence = not _ABSENCE.isdisjoint(code.co_names)
    for name in _imports_in(code) if code.co_exceptiontable else ():
        if not _has(name):  # what the forward does without it, it does until it is there
            yield Question(f"import {name}", functools.partial(_has, name), False)
    for root, steps in ways_in(code):
        ask = functools.partial(_answer, root, steps, variables, is_library)
        text = root + "".join(_shown(step) for step in steps)
        try:
            value = ask()
        except LookupError:  # it leads through no library
            continue
        except Exception:
            if code.co_exceptiontable:  # what is done where it is raised is done while it is
                told = functools.partial(_told, ask)
                yield Question(text, told, told())
            continue
        if isinstance(value, (types.ModuleType, type)) and absence:
            yield from _by_text(text, value, texts, is_library)
        if steps and steps[-1][0] == "attribute":
            yield from asked_by_identity(text, value, is_library)
        if value is sys.modules:
            for name in texts:
                yield Question(f"{name!r} in {text}", functools.partial(_has, name), _has(name))
        elif steps or not isinstance(value, types.ModuleType):
            asked = Question(text, ask, value)
            called = any(kind == "call" for kind, _ in steps)
            if asked.is_plain and not isinstance(value, _KINDS):
                yield asked
            elif called and isinstance(value, (tuple, torch.Tensor)):
                yield asked  # it cannot be compared


def asked_by_identity(
    text: str, value: Any, is_library: Callable[[str], bool]
) -> Iterator[Question]:
    """Yield the question that a function of a library is, which code may call by another name.

    text: by which code comes to it. value: the function, or a partial of it; anything else is none.

    >>> import gc
    >>> [question.text for question in asked_by_identity("asks", gc.isenabled, lambda name: True)]
    ['asks()']
    """
    function = value.func if isinstance(value, functools.partial) else value
    if not isinstance(function, (types.FunctionType, types.BuiltinFunctionType)):
        return
    home = str(function.__module__ or "")
    if not home or not is_library(home) or not _is_question(home, function.__name__):
        return
    ask: Callable[[], Any] = value
    try:
        answer = value()
    except TypeError:  # it takes arguments
        return
    except Exception:
        ask = functools.partial(_told, value)
        answer = ask()
    asked = Question(f"{text}()", ask, answer)
    if asked.is_plain or isinstance(answer, (tuple, torch.Tensor)):
        yield asked


def _by_text(
    text: str, owner: Any, names: Iterable[str], is_library: Callable[[str], bool]
) -> Iterator[Question]:
    """Yield what code may ask a library's module or class for by a name that is a text.

    text: by which code comes to the owner.
    """
    for name in names:
        if not hasattr(owner, name):
            has = functools.partial(hasattr, owner, name)
            yield Question(f"hasattr({text}, {name!r})", has, False)
            continue
        value = getattr(owner, name)
        yield from asked_by_identity(f"{text}.{name}", value, is_library)
        asked = Question(f"{text}.{name}", functools.partial(getattr, owner, name, ABSENT), value)
        if asked.is_plain and not isinstance(value, _KINDS):
            yield asked


def names_looked_up(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of attributes, and of global variables, that code may find to be absent.

    It asks for the attributes by text, or catches an error; global variables likewise.

    >>> code = (lambda x: getattr(x, "scale", 1.0)).__code__
    >>> [sorted(names) for names in names_looked_up(code)]
    [['scale'], []]
    """
    asks, catches = not _ABSENCE.isdisjoint(code.co_names), bool(code.co_exceptiontable)
    texts = [text for text in _texts_in(code) if text.isidentifier()]
    attributes = [*texts] * asks + [*code.co_names] * catches
    roots = [root for root, _ in ways_in(code)] * catches
    variables = [*texts] * ("globals" in code.co_names) + roots
    return frozenset(attributes), frozenset(variables)


@functools.lru_cache(maxsize=4096)
def compares_objects(code: types.CodeType) -> bool:
    """Return whether code compares two objects by `is`, and neither of them is a constant.

    >>> compares_objects((lambda x, y: x is y).__code__)
    True
    >>> compares_objects((lambda x: x is None).__code__)
    False
    """
    before = ""
    for step in dis.get_instructions(code):
        if step.opname == "IS_OP" and before != "LOAD_CONST":
            return True
        before = step.opname
    return False


def _has(name: str) -> bool:
    """Return whether a Python module has been imported."""
    return name in sys.modules


def _shown(step: Step) -> str:
    """Return a step as it stands in code."""
    kind, what = step
    return f".{what}" if kind == "attribute" else f"({', '.join(map(repr, what))})"


def _texts_in(code: types.CodeType) -> tuple[str, ...]:
    """Return the constants of code that may be names."""
    texts = [item for item in code.co_consts if isinstance(item, str)]
    return tuple(text for text in texts if all(map(str.isidentifier, text.split("."))))


def _answer(
    root: str, steps: tuple[Step, ...], variables: Mapping[str, Any], is_library: Any
) -> Any:
    """Return what a way leads to. Raises LookupError where it does not lead through a library."""
    value: Any = variables[root] if root in variables else sys.modules[root]
    within = isinstance(value, types.ModuleType) and is_library(value.__name__)
    if not within and not (steps and steps[0][0] == "call"):
        raise LookupError(root)
    for kind, what in steps:
        if kind == "attribute":
            owner, value = value, getattr(value, what)
            if isinstance(value, float) and getattr(owner, "__name__", "") in _NUMBERS:
                raise LookupError(what)
            continue
        name = str(getattr(value, "__name__", ""))
        home = str(getattr(value, "__module__", "") or type(getattr(value, "__self__", 0)).__name__)
        function: bool = isinstance(value, (types.FunctionType, types.BuiltinFunctionType))
        if not function or not is_library(home) or not _is_question(home, name):
            raise LookupError(name)
        value = value(*what)
    return value


def _told(ask: Callable[[], Any]) -> Any:
    """Return an answer, or what is raised in its place, as a text."""
    try:
        return ask()
    except Exception as error:
        return f"raises {type(error).__name__}"


def _is_question(home: str, name: str) -> bool:
    """Return whether a function is called as questions are. home: its Python module."""
    apart = any(home == each or home.startswith(f"{each}.") for each in _NOT_ASKED)
    watched = any(each in name for each in _WATCHED)
    return bool(_ASKING.search(name)) and not apart and not watched


@functools.lru_cache(maxsize=4096)
def _imports_in(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of the Python modules that code imports."""
    return tuple(i.argval for i in dis.get_instructions(code) if i.opname == "IMPORT_NAME")


@functools.lru_cache(maxsize=4096)
def ways_in(code: types.CodeType) -> tuple[Way, ...]:
    """Return the ways in code: a name, and the attributes and calls with constants behind it."""
    ways: dict[Way, None] = {}
    imported: dict[str, str] = {}
    root, last = "", ""
    steps: list[Step] = []
    given: list[Any] = []
    for step in (*dis.get_instructions(code), None):
        name = "" if step is None else step.opname
        if name in _SKIPPED:
            continue
        if step is not None and root and name == "LOAD_CONST":
            given.append(step.argval)
        elif step is not None and root and not given and name in ("LOAD_ATTR", "LOAD_METHOD"):
            steps.append(("attribute", step.argval))
        elif step is not None and root and name == "CALL" and step.arg == len(given):
            steps.append(("call", tuple(given)))
            given = []
        else:
            if root:
                ways[root, tuple(steps)] = None
            root, steps, given = "", [], []
            if step is not None and name in _NAMES:
                root = step.argval
            elif step is not None and name == "LOAD_FAST" and step.argval in imported:
                root = imported[step.argval]
            elif step is not None and name == "STORE_FAST" and last:
                imported[step.argval] = last
        last = str(step.argval) if step is not None and name == "IMPORT_NAME" else ""
    return tuple(ways)

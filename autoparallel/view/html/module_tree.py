"""The tree of a plan's modules, in which runs of equal siblings are told from others."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from autoparallel.support.module_paths import join_path
from autoparallel.view.folded_rows import index_text

__all__ = ["Module", "module_tree"]


@dataclass(slots=True)
class Module:
    """A Module of the user's tree.

    path: in the model, "" for the model itself. elements: numbers of what is directly in it.
    children: the modules in it, in the order in which they are met. runs: of children that do the
    same in the same way: (name of the run, names of the children), at least two each.
    """

    path: str
    elements: list[int] = field(default_factory=list)
    children: dict[str, Module] = field(default_factory=dict)
    runs: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)


def module_tree(wheres: Sequence[str], contents: Sequence[Hashable]) -> Module:
    """Return the tree of modules with their elements, and the runs of equal siblings in it.

    wheres: the path of the module that each element is in. contents: what each element is, without
    names: equal for elements that do the same in the same way. Modules are equal whose elements
    are, one by one, at the same places in them.

    >>> tree = module_tree(["a.0", "a.1", "b"], ["mm", "mm", "add"])
    >>> tree.children["a"].runs
    [('{0..1}', ('0', '1'))]
    """
    root = Module("")
    for number, where in enumerate(wheres):
        module = root
        for part in where.split(".") if where else ():
            path = join_path(module.path, part)
            module = module.children.setdefault(part, Module(path))
        module.elements.append(number)
    _find_runs(root, contents)
    return root


def _find_runs(module: Module, contents: Sequence[Hashable]) -> Hashable:
    """Find the runs in a module, and return what is equal for modules that are."""
    inside = {name: _find_runs(child, contents) for name, child in module.children.items()}
    run: list[str] = []
    for name in (*module.children, ""):
        follows = (
            bool(run)
            and name.isdigit()
            and int(name) == int(run[-1]) + 1
            and inside[name] == inside[run[-1]]
        )
        if follows:
            run.append(name)
            continue
        if len(run) > 1:
            module.runs.append((index_text([int(one) for one in run]), tuple(run)))
        run = [name] if name.isdigit() else []
    own = tuple(contents[number] for number in module.elements)
    # Hashes would do for most models, but equal hashes are no proof.
    return (own, tuple(inside.items()))

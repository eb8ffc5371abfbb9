"""Ways out of the graph: as a torch.fx.GraphModule that runs, and as a networkx.DiGraph to look at.

What concerns the graph alone is here; view/exports.py adds what a plan knows.
"""

from __future__ import annotations

import builtins
import keyword
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from autoparallel.errors import PlanError
from autoparallel.graph.graph import Graph, Node, Ref, Sym, hint, map_leaves, numel_hint
from autoparallel.graph.operators import makes_list, operator_of

if TYPE_CHECKING:  # imported when needed: parallel modules do without it
    import networkx

__all__ = ["OUTPUT", "FxBuilder", "dataflow", "graph_module", "value_nbytes"]

# The node of a dataflow graph that stands for what is returned.
OUTPUT = "return"
_CLONE, _COPY = torch.ops.aten.clone.default, torch.ops.aten.copy_.default
_DETACH, _SIZE = torch.ops.aten.detach.default, torch.ops.aten.sym_size.int
# Names in the code that torch.fx writes besides those of nodes.
_WRITTEN = frozenset("NoneType device fx_pytree inf nan pytree self torch".split())
_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "Pow": operator.pow,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "floor": torch.sym_int,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
}


class FxBuilder:
    """A torch.fx graph under construction, whose nodes have the names that they are given.

    reserved: names that other nodes will have. attributes: what get_attr nodes read, by path.
    """

    def __init__(self, reserved: Iterable[str]) -> None:
        self.graph = fx.Graph()
        self.reserved = set(reserved)
        self.attributes: dict[str, Any] = {}

    def add(
        self, kind: str, target: Any, args: Any = (), kwargs: Any = None, name: str = ""
    ) -> Any:
        """Add a node. name: as it is to be called, else a free one is made of the target."""
        name = self.legal(name) if name else self.fresh(_named(target))
        made = self.graph.create_node(kind, target, args, kwargs or {}, name)
        assert made.name == name, (made.name, name)
        return made

    def legal(self, name: str) -> str:
        """Return `name`, with an underscore behind it where it means something else to torch.fx."""
        legal = name
        while _is_illegal(legal) or (legal != name and legal in self.reserved):
            legal += "_"
        self.reserved.add(legal)
        return legal

    def attribute(self, path: str, value: Any, name: str = "") -> Any:
        """Add a node that reads an attribute of the module.

        Raises PlanError for a path that torch.fx itself has.
        """
        first = path.partition(".")[0]
        if hasattr(fx.GraphModule, first) or first in _taken():
            raise PlanError(
                f"{path} has no place in a torch.fx.GraphModule",
                why=f"GraphModule has an attribute {first!r} of its own",
                fix="rename this parameter, buffer or module of the model",
            )
        self.attributes[path] = value
        return self.add("get_attr", path, name=name)

    def fresh(self, name: str) -> str:
        """Return `name`, with a number behind it where another node has it."""
        made, count = name, 0
        while made in self.reserved or _is_illegal(made):
            count += 1
            made = f"{name}_{count}"
        self.reserved.add(made)
        return made

    def module(self, outputs: Iterable[Any], name: str) -> fx.GraphModule:
        """Return the module that returns `outputs` as a tuple."""
        self.graph.output(tuple(outputs))
        made = fx.GraphModule(self.attributes, self.graph, name)
        made.graph.lint()
        return made

    def write_back(self, buffer: Any, value: Any) -> None:
        """Give a buffer the value that the pass has made for it."""
        self.add("call_function", _COPY, (buffer, self.add("call_function", _DETACH, (value,))))


def _named(target: Any) -> str:
    """Return the name of a function or an attribute; of an op, the name without its overload."""
    if isinstance(target, str):
        return target.rpartition(".")[2]
    name: str = getattr(target, "overloadpacket", target).__name__
    return name.strip("_")


def _is_illegal(name: str) -> bool:
    """Return whether Python, or the code that torch.fx writes, has something of this name."""
    return keyword.iskeyword(name) or hasattr(builtins, name) or name in _WRITTEN


def _taken() -> set[str]:
    """Return the attributes that every module has."""
    return set(vars(torch.nn.Module()))


def graph_module(
    graph: Graph,
    tensors: Mapping[str, torch.Tensor],
    *,
    fused: Mapping[str, str] | None = None,
    device: torch.device | None = None,
    name: str = "Graph",
) -> fx.GraphModule:
    """Return the graph as a torch.fx.GraphModule: flat tensors in, a tuple of its outputs out.

    tensors: parameters, buffers and constants by their paths; they are shared, not copied, so that
    gradients and written buffers are those of whoever owns them. fused: products and the additions
    of their bias, by node names, that are to be one call. device: where ops without inputs create
    their tensors. Nodes have the names that they have in the graph, with an underscore behind those
    that Python has itself ("and", "slice").
    Raises PlanError for a tensor that is not given and for sizes that torch.fx has no form for.
    """
    return _Importer(graph, tensors, fused or {}, device).module(name)


class _Importer:
    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, torch.Tensor],
        fused: Mapping[str, str],
        device: torch.device | None,
    ) -> None:
        self.graph, self.tensors, self.device = graph, tensors, device
        self.fused = fused
        self.products = {addition: product for product, addition in fused.items()}
        self.builder = FxBuilder((*graph.values, *(node.name for node in graph.nodes)))
        self.values: dict[str, Any] = {}
        self.sizes: dict[sympy.Expr, Any] = {}
        self.symbols: dict[sympy.Expr, tuple[Any, int]] = {}
        self.buffers: dict[str, Any] = {}
        self.written = dict(graph.mutations)

    def module(self, name: str) -> fx.GraphModule:
        self.stored()
        for node in self.graph.calls:
            if node.name not in self.fused:
                self.call(node)
        for path, value in self.graph.mutations:
            self.builder.write_back(self.buffers[path], self.values[value])
        return self.builder.module((self.values[output] for output in self.graph.outputs), name)

    def stored(self) -> None:
        """Add the inputs first, as torch.fx has them, and then what the module holds."""
        stored = [node for node in self.graph.nodes if node.kind not in ("input", "call")]
        for node in self.graph.nodes:
            if node.kind == "input":
                placed = self.builder.add("placeholder", node.name, name=node.result.name)
                self.values[node.result.name] = placed
        for node in stored:
            if node.target not in self.tensors:
                raise PlanError(
                    f"the {node.kind} {node.target} is not given",
                    why="a graph holds names and shapes, no tensors",
                    fix="pass the plan, or the model besides: to_fx(plan, model)",
                )
            tensor, value = self.tensors[node.target], node.result.name
            if node.target not in self.written or node.kind != "buffer":
                self.values[value] = self.builder.attribute(node.target, tensor, value)
                continue
            # What the backward pass keeps of a buffer must not change when it is written to.
            whole = self.builder.fresh(f"{value}_stored")
            self.buffers[node.target] = self.builder.attribute(node.target, tensor, whole)
            read = (self.buffers[node.target],)
            self.values[value] = self.builder.add("call_function", _CLONE, read, name=value)
        for node in self.graph.nodes:
            for dim, size in enumerate(node.result.shape if node.kind == "input" else ()):
                if isinstance(size, Sym) and size.expr.is_Symbol:
                    self.symbols.setdefault(size.expr, (self.values[node.result.name], dim))

    def call(self, node: Node) -> None:
        target, args = node.target, node.args
        product = self.products.get(node.name)
        if product is not None:
            inner = self.graph.producers[product]
            target, args = inner.target, (*inner.args, Ref(node.operands()[1]))
        op = operator_of(target)
        if op is None:
            raise PlanError(
                f"{target} is no op that torch.fx could call", where=f"{node.where} {node.line}"
            )
        kwargs = {key: map_leaves(self.leaf, value) for key, value in node.kwargs}
        several = len(node.results) > 1 or makes_list(target)
        single = "" if several and node.name in self.graph.values else node.name
        called = self.builder.add("call_function", op, map_leaves(self.leaf, args), kwargs, single)
        called.meta["nn_module_path"], called.meta["line"] = node.where, node.line
        if not several:
            self.values[node.result.name] = called
            return
        for index, value in enumerate(node.results):
            self.values[value.name] = self.builder.add(
                "call_function", operator.getitem, (called, index), name=value.name
            )

    def leaf(self, leaf: Any) -> Any:
        """Return an argument as torch.fx takes it."""
        if isinstance(leaf, Ref):
            return self.values[leaf.name]
        if isinstance(leaf, Sym):
            return self.size(leaf.expr)
        if isinstance(leaf, torch.device) and self.device is not None:
            return self.device
        return leaf

    def size(self, expr: sympy.Expr) -> Any:
        """Return a size as a number, or as nodes that compute it from the inputs' sizes."""
        if expr.is_Integer:
            return int(expr)
        if expr not in self.sizes:
            self.sizes[expr] = self.computed(expr)
        return self.sizes[expr]

    def computed(self, expr: sympy.Expr) -> Any:
        if expr in self.symbols:
            return self.builder.add("call_function", _SIZE, self.symbols[expr])
        above, below = expr.as_numer_denom()
        if below != 1:
            parts = (self.size(above), self.size(below))
            return self.builder.add("call_function", operator.floordiv, parts)
        function = _OPERATORS.get(type(expr).__name__)
        if function is None:
            raise PlanError(
                f"the size {expr} has no form in torch.fx",
                why="it does not follow from the inputs' sizes by integer arithmetic",
                fix="trace with inputs of fixed sizes",
            )
        first, *rest = (self.size(arg) for arg in expr.args)
        if not rest:
            return self.builder.add("call_function", function, (first,))
        for other in rest:
            first = self.builder.add("call_function", function, (first, other))
        return first


def value_nbytes(graph: Graph, name: str) -> int:
    """Return the bytes of a whole value, for the example inputs."""
    value = graph.values[name]
    return numel_hint(value.shape) * value.dtype.itemsize


def dataflow(graph: Graph) -> networkx.DiGraph:
    """Return the nodes of the graph and what flows between them, with what the graph knows of both.

    A node has kind, op, module, line, and per result values, shapes, sizes (for the example inputs)
    and dtypes, and nbytes of all results. An edge has values, shapes, nbytes: a node may read
    several results of another. The node "return" reads what the graph returns.
    """
    import networkx

    made = networkx.DiGraph()
    for node in graph.nodes:
        made.add_node(
            node.name,
            kind=node.kind,
            op=node.target if node.kind == "call" else "",
            path="" if node.kind == "call" else node.target,
            module=node.where,
            line=node.line,
            values=tuple(value.name for value in node.results),
            shapes=tuple(tuple(map(str, value.shape)) for value in node.results),
            sizes=tuple(tuple(map(hint, value.shape)) for value in node.results),
            dtypes=tuple(str(value.dtype).removeprefix("torch.") for value in node.results),
            nbytes=sum(value_nbytes(graph, value.name) for value in node.results),
        )
    made.add_node(
        OUTPUT, kind="output", op="", path="", module="", line="", values=(), shapes=(), sizes=(),
        dtypes=(), nbytes=0,
    )  # fmt: skip
    for node in graph.nodes:
        for name in dict.fromkeys(node.operands()):
            _flow(made, graph, name, node.name)
    for name in dict.fromkeys(graph.outputs):
        _flow(made, graph, name, OUTPUT)
    return made


def _flow(made: networkx.DiGraph, graph: Graph, name: str, reader: str) -> None:
    """Note that a node reads a value."""
    producer = graph.producers[name].name
    if not made.has_edge(producer, reader):
        made.add_edge(producer, reader, values=(), shapes=(), nbytes=0)
    edge = made.edges[producer, reader]
    edge["values"] += (name,)
    edge["shapes"] += (tuple(map(str, graph.values[name].shape)),)
    edge["nbytes"] += value_nbytes(graph, name)

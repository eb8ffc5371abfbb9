"""The state of a parallel module: the layouts of its parameters, and its programs."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autoparallel.capture.branch_ways import Ways
from autoparallel.errors import AutoParallelError
from autoparallel.graph.attribute_read import SIMPLE
from autoparallel.graph.captured import Captured, Modes, Surroundings
from autoparallel.graph.graph import Sym
from autoparallel.parallel.call_headers import CallHeaders
from autoparallel.parallel.flat_calls import FlatCalls
from autoparallel.parallel.frozen_values import equal, frozen
from autoparallel.parallel.guarded_contents import LeftValues
from autoparallel.parallel.guards import Guards
from autoparallel.parallel.inner_hooks import InnerHooks
from autoparallel.parallel.local_inputs import LocalInputs
from autoparallel.parallel.local_parameters import LocalParameters
from autoparallel.parallel.parameters import GatheredCopy, LocalParameter, ParameterLayouts
from autoparallel.parallel.pipeline_place import PipelinePlace
from autoparallel.parallel.seeds import generator_of
from autoparallel.parallel.split_outputs import SplitOutputs
from autoparallel.parallel.surrounding_modes import modes_of_split
from autoparallel.parallel.tree_shape import TreeShape
from autoparallel.parallel.uncaptured_python import WholeParameters
from autoparallel.placement import Layout, Shard
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import Program
from autoparallel.runtime import rng
from autoparallel.runtime.ranks import Ranks
from autoparallel.support.memory_writes import memory_of
from autoparallel.support.pytree import Skeleton, leaf_paths

__all__ = ["Entry", "Replan", "State", "Tree", "state_of", "user_forward"]

_CPU = torch.device("cpu")
_WORDS = re.compile(r"\w+")

# A function from the model on the meta device, the path of a module in it, its inputs, the layouts
# in which its parameters are stored, whether Python calls it, and the ways that other calls of it
# go where it branches on values, to a plan. It raises CaptureError where the module cannot be
# traced.
Replan = Callable[
    [nn.Module, str, tuple[Any, ...], Mapping[str, Any], Mapping[str, Layout], bool, Ways], Plan
]


# Sizes of inputs for which the shapes of outputs are remembered.
_MOST_SIZES = 1024


@dataclass
class Entry:
    """A program and what its inputs must look like.

    plan, captured: what it was emitted of. leaves: its parameters, in the order in which it takes
    them; parameters: the same, as calls ask for them. shapes: of its inputs, in symbolic sizes.
    guards: the attributes that its trace has read. frozen: the places of parameters that needed no
    gradient when it was planned. known: whether it is right for inputs of some shapes, types and
    need of gradients, as far as it was asked: to evaluate the guards takes long, and most calls are
    like one before. wholes: the shapes of whole outputs, by those of the inputs. split_outputs: the
    DTensors that they are outside. told: the user knows that a call took another branch on values.
    compiled: runs the program where its call is compiled, from the first such call on.
    """

    plan: Plan
    captured: Captured
    program: Program
    leaves: list[LocalParameter]
    shapes: list[tuple[Any, ...]]
    guards: Guards
    frozen: list[tuple[dict[str, Any], str]]
    parameters: LocalParameters = field(init=False)
    known: dict[tuple[Any, ...], bool] = field(default_factory=dict)
    told: bool = False
    wholes: dict[tuple[Any, ...], tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    split_outputs: SplitOutputs = field(default_factory=SplitOutputs)
    compiled: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        self.parameters = LocalParameters(self.leaves)

    def whole_shapes(self, inputs: list[torch.Tensor]) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the whole outputs, of those that are split, for inputs of these
        sizes.
        """
        key = tuple([tensor.shape for tensor in inputs])
        if key not in self.wholes:
            # A dim of an input whose size is a symbol by itself says what the symbol is.
            actual_sizes: dict[Any, int] = {}
            for tensor, sizes in zip(inputs, self.shapes, strict=True):
                for actual, size in zip(tensor.shape, sizes, strict=True):
                    if isinstance(size, Sym) and size.expr.is_Symbol:
                        actual_sizes[size.expr] = actual
            if len(self.wholes) > _MOST_SIZES:
                self.wholes.clear()
            self.wholes[key] = tuple(
                tuple(int(s.expr.subs(actual_sizes)) if isinstance(s, Sym) else s for s in shape)
                if any(isinstance(placement, Shard) for placement in layout)
                else ()
                for layout, shape in self.program.outputs
            )
        return self.wholes[key]

    def label(self, statement: str) -> str:
        """Return what a line of the program is in the model; empty where that is not known."""
        ops = {op.name: op for op in self.plan.ops}
        parameters = {choice.name: choice.path for choice in self.plan.parameters}
        for word in _WORDS.findall(statement):
            if word in ops:
                op = ops[word]
                return f"{op.where or self.plan.model}, {op.line}" if op.line else op.where
            if word in parameters:
                return f"the parameter {parameters[word]}"
        return ""

    @cached_property
    def given(self) -> Any:
        """The content of the objects among the trace's arguments, None where there are none.

        It is asked for when the program is made: the objects may change.
        """
        constants = list(leaf_paths(self.captured.inputs, "constant").values())
        some = any(not isinstance(item, SIMPLE) for item in constants)
        return frozen(constants) if some else None

    def takes(self, inputs: Skeleton) -> bool:
        """Return whether objects among a call's arguments are like those that were traced.

        inputs: the skeleton of the arguments, which is equal to that of the trace: numbers and
        texts are the same, and objects are of the same types.
        """
        if self.given is None:
            return True
        return equal(self.given, frozen(list(leaf_paths(inputs, "constant").values())))

    def fits(self, inputs: list[torch.Tensor], surroundings: Surroundings) -> bool:
        """Return whether the program is right for these inputs, and all else is as it was traced.

        See `Captured.fits`. A parameter that was frozen, and is trained now, would get no gradient;
        one that was trained, and is frozen now, gets none.
        """
        captured = self.captured
        if captured.surroundings != surroundings or not self.guards.hold():
            return False
        if captured.gradients not in (None, torch.is_grad_enabled()):
            return False
        if self.frozen and any(held[name].requires_grad for held, name in self.frozen):
            return False
        if captured.given and not captured.alike(inputs):
            return False
        # A list is quicker to make than a generator is to run, and this is asked at every call.
        key = tuple([(t.shape, t.dtype, t.layout, t.requires_grad) for t in inputs])
        if key not in self.known:
            self.known[key] = self.captured.fits(inputs)
        return self.known[key]


@dataclass
class Tree:
    """The things that all split modules of one model share.

    root: the model. skeleton: the same on the meta device, by which other modes and inputs are
    traced. ranks, mesh: this rank's place, and torch's DeviceMesh, None for a single process.
    replan: a function that plans for other calls. strict: whether Python in place of a program is
    an error. whole: the parameters as Python reads them. copies: the gathered copies that compute
    in place of parameters, by the parameters' ids. parameters: all by path, with all paths of tied
    ones. shape: the modules and parameters for which all this holds. depth: the number of Python
    forwards that are running now, one inside the other. attributes: those of the model when the
    skeleton was made of it. elsewhere: the same skeleton with tensors that seem to lie on a device.
    local: the inputs of which ranks bring parts of the batch. headers: the header that the ranks
    exchange in every call of the user's, None where they compare nothing. classes: those of split
    modules, by the user's classes and the prefixes of their names. lent: the values of parameters
    that calls have returned, weakly, with their versions. left: what programs have left in
    attributes of modules. within: the modes that saw calls of torch's functions when it was made,
    in which it was planned. pipeline: this rank's place in it, None
    where there are no stages; `ranks` and `mesh` are then those of its stage.
    """

    root: nn.Module
    skeleton: nn.Module
    ranks: Ranks
    mesh: DeviceMesh | None
    replan: Replan
    strict: bool
    whole: WholeParameters
    copies: Mapping[int, GatheredCopy]
    parameters: Mapping[str, nn.Parameter]
    shape: TreeShape
    local: LocalInputs | None = None
    headers: CallHeaders | None = None
    depth: int = 0
    classes: dict[tuple[type[nn.Module], str], type[nn.Module]] = field(default_factory=dict)
    attributes: Any = None
    elsewhere: dict[torch.device, nn.Module] = field(default_factory=dict)
    lent: dict[str, tuple[Any, int]] = field(default_factory=dict)
    left: LeftValues = field(default_factory=LeftValues)
    within: tuple[type, ...] = field(default_factory=modes_of_split)
    pipeline: PipelinePlace | None = None

    def take_up_parameters(self) -> None:
        """Know the parameters by the objects that they are now, which other objects have become."""
        self.parameters = dict(self.root.named_parameters(remove_duplicate=False))
        self.copies = {id(copy.owner[copy.name]): copy for copy in self.copies.values()}
        self.shape = TreeShape(self.root.modules())

    def lend(self, path: str, value: torch.Tensor, entry: Entry) -> None:
        """Note that the caller is given the value of a parameter, to which it must not write."""
        leaf = next((leaf for leaf in entry.leaves if leaf.path == path), None)
        if leaf is None or memory_of(value) != memory_of(leaf.get(None)):
            self.lent[path] = (weakref.ref(value), value._version)

    def refuse_written(self) -> None:
        """Raise AutoParallelError where the caller has written to a parameter's value."""
        for path, (reference, version) in list(self.lent.items()):
            value = reference()
            if value is not None and value._version != version:
                raise AutoParallelError(
                    f"{path} was returned by the model, and then written to",
                    where=path,
                    why="on several ranks the model returns a copy of the whole parameter, and the "
                    "parameter itself does not change with it",
                    fix="write to the parameter: under torch.no_grad, "
                    f"model.get_parameter({path!r}).copy_(value)",
                )
        self.lent.clear()

    def surroundings(self) -> Surroundings:
        """Return the state of torch around a call that is made now.

        Functions of split tensors must be off: one that is asked where it lies would take longer
        than all the rest.
        """
        return Surroundings.now(self.device())

    def device(self) -> torch.device:
        """Return the device of the parameters; the CPU where there are none."""
        # The first one tells, mostly. A generator would take longer to make than it to ask.
        for parameter in self.shape.parameters:
            if not parameter.is_meta:
                return parameter.device
        return _CPU


@dataclass
class State:
    """Everything that the parallel module adds to the user's.

    path: the module's path in the model. skeleton: the module on the meta device, to trace other
    modes and inputs. parameters: the layouts of its parameters, by path. checks: number of calls
    left in which the ranks compare their inputs. forward: the user's own. own_forward: the same
    where it was set on the object. load_hook: the handle of our hook on load_state_dict. plan: the
    one that decided how parameters are stored, None where a module around it did. entries: programs
    by (modes, structure of the inputs). python: modes in which the module cannot be traced, and
    stays the user's Python. full: no more programs are made. warned: the user was told that hooks
    were registered in it. members: the module and all in it, from the first call on. hooks: those
    inside of it, which programs leave out. calls: what its calls look like.
    """

    path: str
    tree: Tree
    skeleton: nn.Module
    parameters: dict[str, ParameterLayouts]
    checks: int
    forward: Callable[..., Any]
    own_forward: Callable[..., Any] | None
    load_hook: Any
    plan: Plan | None
    entries: dict[tuple[Modes, Skeleton], list[Entry]] = field(default_factory=dict)
    calls: FlatCalls = field(default_factory=FlatCalls)
    python: set[Modes] = field(default_factory=set)
    full: bool = False
    warned: bool = False
    members: tuple[nn.Module, ...] = ()
    hooks: InnerHooks | None = None

    @property
    def ranks(self) -> Ranks:
        """This rank's place among the ranks."""
        return self.tree.ranks

    @property
    def storage(self) -> dict[str, Layout]:
        """The layouts of the parameters as programs read them, by path."""
        return {path: layouts.storage for path, layouts in self.parameters.items()}

    @property
    def layouts(self) -> dict[str, Layout]:
        """The layouts of the parameters as the user and the optimizer see them, by path."""
        return {path: layouts.state for path, layouts in self.parameters.items()}

    @property
    def mesh(self) -> DeviceMesh | None:
        """The ranks as torch's DTensor has them; None for a single process."""
        return self.tree.mesh

    @property
    def generator(self) -> rng.Generator:
        """The model's generator, from which all of its modules draw random numbers."""
        return generator_of(self.tree.root)


def user_forward(
    module: nn.Module, kind: Any, own_forward: Callable[..., Any] | None
) -> Callable[..., Any]:
    """Return the user's own forward of a module.

    kind: the user's class. own_forward: a function that was set on the object, which hides that of
    the class.

    >>> user_forward(nn.ReLU(), nn.ReLU, None)(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """
    # The class is asked at each call, as its forward may be replaced.
    return own_forward or (lambda *args, **kwargs: kind.forward(module, *args, **kwargs))


def state_of(module: nn.Module) -> State:
    """Return the state of a parallel module. Raises AutoParallelError for any other module."""
    found = module.__dict__.get("_autoparallel")
    if not isinstance(found, State):
        raise AutoParallelError(
            f"{type(module).__name__} is no parallel module",
            why="it was not made by autoparallelize() or apply_plan(), or is a part of such",
            fix="pass the parallel module itself",
        )
    return found

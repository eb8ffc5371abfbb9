"""The private names of torch that the project uses, which are reached here and nowhere else.

A new release of torch may move any of them without notice; then this file changes, and no other.
tests/support/test_torch_private.py says of each how it must behave, and reads the sources for
others.

Three kinds of names are read where they are used, because they are attributes of objects and torch
documents them: `Tensor._version`; the dictionaries of a module (`_parameters`, `_buffers`,
`_modules`, `_non_persistent_buffers_set`); the keys of `Node.meta` of an exported program (`val`,
`nn_module_stack`, `stack_trace`). The same file of tests says how these behave.
"""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from types import CodeType, FunctionType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import sympy
    from torch._C._functorch import is_functorch_wrapped_tensor as is_functorch_wrapped_tensor
    from torch._ops import OpOverload as OpOverload
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement
    from torch.fx.experimental.proxy_tensor import decompose as decompose
    from torch.fx.experimental.proxy_tensor import get_proxy_mode as get_proxy_mode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv as ShapeEnv
    from torch.multiprocessing.reductions import StorageWeakRef as StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
    from torch.utils._pytree import tree_flatten as tree_flatten
    from torch.utils._pytree import tree_leaves as tree_leaves
    from torch.utils._pytree import tree_map as tree_map
    from torch.utils._pytree import tree_unflatten as tree_unflatten
    from torch.utils._sympy.printers import PythonPrinter as PythonPrinter

# The module that has a name, imported when the name is first asked for.
_HOMES = {
    # Runs an op on tensors that have sizes and strides but no data.
    "FakeTensorMode": "torch._subclasses.fake_tensor",
    # The type of an op with one schema, which the calls of an exported program name.
    "OpOverload": "torch._ops",
    # Prints an expression in sizes as Python.
    "PythonPrinter": "torch.utils._sympy.printers",
    # Keeps the symbols of sizes: tensors without data have them in the trace that they begin.
    "ShapeEnv": "torch.fx.experimental.symbolic_shapes",
    # A weak reference to a tensor's memory, which keeps its address from being used again.
    "StorageWeakRef": "torch.multiprocessing.reductions",
    # Sees every op that runs, below autograd and autocast.
    "TorchDispatchMode": "torch.utils._python_dispatch",
    # Traces ops by the decompositions of a table.
    "decompose": "torch.fx.experimental.proxy_tensor",
    # The tracer at work, None where nothing is traced.
    "get_proxy_mode": "torch.fx.experimental.proxy_tensor",
    # Recognizes tensors within torch.func's transforms, of which nothing may be kept.
    "is_functorch_wrapped_tensor": "torch._C._functorch",
    # The leaves of nested lists, tuples and dicts, with and without the structure, and back.
    "tree_flatten": "torch.utils._pytree",
    "tree_leaves": "torch.utils._pytree",
    "tree_map": "torch.utils._pytree",
    "tree_unflatten": "torch.utils._pytree",
}

# Functions of torch that are written in Python and take what their ops take, in the same order.
_ALIKE = frozenset({"norm", "split"})
# Loggers whose messages the project replaces by errors of its own.
EXPORT_LOGGERS = ("torch._export", "torch.export", "torch.fx")
FAKE_TENSOR_LOGGER = "torch._subclasses.fake_tensor"
# The text by which a program calls those of torch's Python bindings that have no public name.
NN_BINDINGS = "torch._C._nn"

__all__ = [
    "EXPORT_LOGGERS",
    "FAKE_TENSOR_LOGGER",
    "NN_BINDINGS",
    "FakeTensorMode",
    "OpOverload",
    "PythonPrinter",
    "ShapeEnv",
    "StorageWeakRef",
    "TorchDispatchMode",
    "apply_directly",
    "assert_on_device",
    "at_end_of_backward",
    "backward_pass",
    "break_graph",
    "call_hooks_of",
    "carries_backward_hooks",
    "checkpoint_classes",
    "current_dispatch_mode",
    "current_function_mode",
    "custom_op_functions",
    "decompose",
    "default_store",
    "describe_pieces",
    "differentiates_custom_op",
    "dispatch_registrations",
    "distributed_tensor_like",
    "expression_of",
    "fake_process_group",
    "flattened_group",
    "forward_gradients_are_on",
    "frame_compiler",
    "functional_collectives",
    "get_proxy_mode",
    "global_call_hooks",
    "gradient_hooks_of",
    "guards_of",
    "handle_distributed",
    "has_backward",
    "has_torch_binding",
    "hint_of",
    "hook_handles_so_far",
    "in_backward",
    "in_function_transform",
    "is_composite",
    "is_custom_op",
    "is_fixed",
    "is_functorch_wrapped_tensor",
    "local_part",
    "local_parts",
    "multiply_all_",
    "nn_binding",
    "norms_of",
    "outside_transforms",
    "parts_of_norms",
    "pipeline_order",
    "place_in_backward",
    "placed_alike",
    "references_to",
    "remembering_fake_results",
    "run_as_python",
    "run_in_place",
    "run_when_ready",
    "saved_tensors_hooks_are_set",
    "schema_of",
    "set_frame_compiler",
    "share_local_part",
    "storage_key",
    "strided_shard",
    "strided_split_factor",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "truncated_normal_replaced",
    "wants_full_graph",
    "will_accumulate",
    "with_function_overrides",
    "without_function_modes",
    "without_function_overrides",
    "without_modes",
    "wrapper_tensor",
]


def __getattr__(name: str) -> Any:
    """Import a name of _HOMES when it is first asked for (PEP 562), so that this file is quick."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


# torch.compile, which takes up the frames of Python as they begin.

# The function of torch.compile that is given each frame that begins in this thread, None where none
# is; and a function that sets it and returns the one before. Both are written in C, so that a call
# is no frame itself.
frame_compiler: Callable[[], Any] = torch._C._dynamo.eval_frame.get_eval_frame_callback
set_frame_compiler: Callable[[Any], Any] = torch._C._dynamo.eval_frame.set_eval_frame


def run_as_python(code: CodeType) -> None:
    """Have torch.compile run the frames of this code as they are, and go on in those that it
    calls."""
    native = torch._C._dynamo.eval_frame
    actions = native._FrameAction
    native.set_code_exec_strategy(code, native._FrameExecStrategy(actions.SKIP, actions.DEFAULT))


def break_graph(message: str) -> None:
    """Have torch.compile, which traces this call, end its graph here and say why.

    With fullgraph=True it raises torch._dynamo.exc.Unsupported with the message.
    """
    torch._dynamo.graph_break(msg=message)


def wants_full_graph(compiler: Any) -> bool:
    """Return whether what `frame_compiler` gave was made with fullgraph=True."""
    inner = getattr(compiler, "_torchdynamo_orig_backend", None)
    return bool(getattr(inner, "_one_graph", False))


# Modes that watch calls.


def current_dispatch_mode() -> Any:
    """Return the innermost mode that sees ops, None where there is none."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    return _get_current_dispatch_mode()


def current_function_mode() -> Any:
    """Return the innermost mode that sees calls of torch's functions, None where there is none."""
    from torch.overrides import _get_current_function_mode

    return _get_current_function_mode()


def without_modes() -> AbstractContextManager[Any]:
    """Return a context in which no mode sees ops: neither a tracer's nor one of fake tensors."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def without_function_modes() -> AbstractContextManager[Any]:
    """Return a context in which no mode sees calls of torch's functions."""
    return torch._C.DisableTorchFunction()


def without_function_overrides() -> AbstractContextManager[Any]:
    """Return a context in which `__torch_function__` of tensor subclasses is not called."""
    return torch._C.DisableTorchFunctionSubclass()


def with_function_overrides() -> AbstractContextManager[Any]:
    """Return a context in which `__torch_function__` is called, also within one in which it is
    not.
    """
    return torch._C._EnableTorchFunction()


# Initializers.

_replacing = threading.RLock()


@contextmanager
def truncated_normal_replaced(replacement: Callable[..., Any]) -> Iterator[None]:
    """Let `nn.init.trunc_normal_` call a function in its place, one thread after the other.

    replacement: is given what it may call otherwise, the tensor, mean, deviation, least and
    greatest number, and the generator by keyword.
    """
    with _replacing:
        original = torch.nn.init._no_grad_trunc_normal_

        def replaced(
            tensor: Any, mean: Any, std: Any, a: Any, b: Any, generator: Any = None
        ) -> Any:
            return replacement(original, tensor, mean, std, a, b, generator=generator)

        torch.nn.init._no_grad_trunc_normal_ = replaced
        try:
            yield
        finally:
            torch.nn.init._no_grad_trunc_normal_ = original


# Ops and their schemas.


def schema_of(operation: Any) -> Any:
    """Return the schema of an op: its arguments, its results, its writes. None for other functions.

    >>> schema_of(torch.ops.aten.relu.default).name
    'aten::relu'
    """
    return getattr(operation, "_schema", None)


def is_composite(operation: Any) -> bool:
    """True if torch defines the op by other ops, which `operation.decompose` runs."""
    return bool(operation._can_decompose())


def dispatch_registrations(name: str) -> str:
    """Return the dispatcher's text about the kernels of an op. name: as in "aten::add.Tensor"."""
    return torch._C._dispatch_dump(name)


def _custom_op(name: str) -> Any:
    """Return the definition of an op that was made by torch.library.custom_op, else None."""
    return import_module("torch._library.custom_ops").OPDEFS.get(name)


def is_custom_op(name: str) -> bool:
    """True if an op was made by torch.library.custom_op. name: as in "mylib::scale"."""
    return _custom_op(name) is not None


@cache
def checkpoint_classes() -> dict[tuple[str, str], Any]:
    """Return the private names in a checkpoint's table of contents: classes of plain data, and the
    function that finds a tensor's layout by its name.
    """
    homes = {
        "_StorageInfo": "torch.distributed.checkpoint.filesystem",
        "_MEM_FORMAT_ENCODING": "torch.distributed.checkpoint.metadata",
        "_get_layout": "torch.serialization",
    }
    return {(home, name): getattr(import_module(home), name) for name, home in homes.items()}


def custom_op_functions(name: str) -> tuple[Any, Any, Any, Any] | None:
    """Return the Python functions of a torch.library.custom_op, None for other ops.

    name: as in "mylib::scale". They are the kernel, the fake kernel, the function that sets up the
    context, and the backward; each is None where the op has none.
    """
    definition = _custom_op(name)
    if definition is None:
        return None
    return (
        definition._init_fn,
        definition._abstract_fn,
        definition._setup_context_fn,
        definition._backward_fn,
    )


def differentiates_custom_op(function: Any) -> bool:
    """Return whether torch.library has made an autograd.Function to differentiate an op."""
    return bool(function.__module__ == "torch._library.autograd")


def has_backward(name: str) -> bool:
    """True unless an op is known to have no backward; only of custom ops that is known."""
    functions = custom_op_functions(name)
    return functions is None or functions[3] is not None


def fake_process_group(rank: int, world_size: int) -> None:
    """Start a process group of ranks that do not run: its collectives return at once, with what was
    in the memory. It is for measuring what one rank computes.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=world_size
    )


def functional_collectives() -> Any:
    """Return the ops of torch.distributed that return their results, so that they can be traced.

    They are called by position, and are not differentiable.
    """
    names = ["all_reduce", "all_reduce_", "all_gather_into_tensor", "reduce_scatter_tensor"]
    names += ["all_to_all_single", "wait_tensor"]
    return SimpleNamespace(**{name: _past_autograd(name) for name in names})


def _past_autograd(name: str) -> Callable[..., Any]:
    """Return a collective of torch.distributed that autograd is not told of.

    Torch wraps each of these ops in Python for autograd, which takes longer than all the rest of
    the call. A tracer is given the op itself.
    """
    function = getattr(torch.ops._c10d_functional, name).default
    # The same without a function of Python around it.
    direct, is_compiling = function._op, torch.compiler.is_compiling
    below = torch._C._AutoDispatchBelowAutograd

    def call(*arguments: Any) -> Any:
        if is_compiling():
            return function(*arguments)
        with below():
            return direct(*arguments)

    return call


def apply_directly(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return `function.apply` for calls outside of transforms of torch.func, which it looks for,
    operand by operand, before each of them.

    >>> class Double(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x):
    ...         return x * 2
    ...     @staticmethod
    ...     def backward(ctx, grad):
    ...         return grad * 2
    >>> x = torch.ones(2, requires_grad=True)
    >>> apply_directly(Double)(x).sum().backward()
    >>> x.grad
    tensor([2., 2.])
    """
    direct: Any = super(torch.autograd.Function, function)
    apply: Callable[..., Any] = direct.apply
    return apply


def nn_binding(name: str) -> Any:
    """Return the Python binding of an op in `NN_BINDINGS`; None where it has none there."""
    return getattr(torch._C._nn, name, None)


def has_torch_binding(name: str) -> bool:
    """True if `torch.<name>` is the op's own Python binding, not a function written around it.

    >>> has_torch_binding("relu"), has_torch_binding("unique"), has_torch_binding("cdist")
    (True, False, False)
    """
    # Functions written in Python around a binding may take other arguments: cdist has a text where
    # its op has a number.
    around = isinstance(getattr(torch, name, None), FunctionType) and name not in _ALIKE
    return hasattr(torch._C._VariableFunctions, name) and not around


# Tensors.


def assert_on_device(condition: torch.Tensor, message: str) -> None:
    """Fail where a tensor of one truth value is false, without a wait for the device.

    On a GPU the failure is reported by a later call.
    """
    torch._assert_async(condition, message)


def storage_key(held: torch.Tensor | torch.UntypedStorage) -> int:
    """Return the identity of a tensor's memory: equal for views of one another, fake ones too.

    It is the address of torch's record of the memory, which may be used again once that memory is
    gone (see StorageWeakRef).
    """
    storage = held.untyped_storage() if isinstance(held, torch.Tensor) else held
    return storage._cdata


def wrapper_tensor(
    kind: type[torch.Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Any:
    """Return a tensor of a subclass, with a shape, a type and a device but no memory of its own."""
    return torch.Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=device)


def local_part(tensor: DTensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, the tensor itself; `to_local` makes a view of it."""
    return tensor._local_tensor


def local_parts(tensors: Iterable[DTensor]) -> Iterator[torch.Tensor]:
    """Return `local_part` of each of many DTensors, by a loop that runs in C."""
    return map(_LOCAL_PART, tensors)


_LOCAL_PART = operator.attrgetter("_local_tensor")


def placed_alike(one: DTensor, other: DTensor) -> bool:
    """Return whether two DTensors of one mesh have the same placements.

    One that was made like the other shares its description of these, which is seen at once.
    """
    return one._spec is other._spec or one.placements == other.placements


@cache
def parts_of_norms() -> frozenset[Any]:
    """Return the functions with which torch's `clip_grad_norm_` and its loss scaling look at each
    gradient of many: what they find is put together over all gradients that they were given.
    """
    return frozenset(
        {
            torch.linalg.vector_norm,
            torch._foreach_norm,
            torch._amp_foreach_non_finite_check_and_unscale_,
        }
    )


def norms_of(
    tensors: Sequence[torch.Tensor], order: float, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Return the p-norms of tensors, on a GPU by one kernel. dtype: in which they are summed."""
    return list(torch._foreach_norm(list(tensors), order, dtype=dtype))


def multiply_all_(tensors: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply tensors in place by one number, on a GPU by one kernel."""
    torch._foreach_mul_(list(tensors), factor)


def share_local_part(target: DTensor, source: DTensor) -> None:
    """Give `target` the memory and the placements of `source`, and leave it the same object."""
    target._local_tensor, target._spec = source._local_tensor, source._spec


def distributed_tensor_like(
    local: torch.Tensor, like: DTensor, requires_grad: bool = False
) -> DTensor:
    """Return a DTensor that holds `local` and is placed as another.

    It is asked for at each gradient. DTensor's `__init__` only tells torch.export of the new
    tensor, and takes longer than all the rest.
    """
    kind = _distributed_class()
    return kind.__new__(kind, local, like._spec, requires_grad=requires_grad)


@cache
def _distributed_class() -> type[DTensor]:
    """DTensor, which takes long to import, and which is asked for in every backward pass."""
    from torch.distributed.tensor import DTensor

    return DTensor


def handle_distributed(handlers: dict[Any, Callable[..., Any]]) -> None:
    """Have DTensor call a function in place of an op: function(op, arguments, keyword arguments).

    handlers: the functions, by the ops' overloads.
    """
    _distributed_class()._op_dispatcher._custom_op_handlers.update(handlers)


def in_function_transform() -> bool:
    """Return whether a transform of torch.func, such as grad or vmap, is at work here."""
    return _interpreter_stack()() is not None


@cache
def _interpreter_stack() -> Callable[[], Any]:
    """Return the function that tells of the transforms; an import takes longer than the answer."""
    from torch._C._functorch import peek_interpreter_stack

    return peek_interpreter_stack


def outside_transforms() -> AbstractContextManager[Any]:
    """Return a context in which no transform of torch.func is at work.

    What is computed there is a constant for the transforms around it.
    """
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    if not in_function_transform():
        return nullcontext()
    context: AbstractContextManager[Any] = temporarily_clear_interpreter_stack()
    return context


def default_store() -> Any:
    """Return the store through which the processes of the default process group met."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def flattened_group(devices: DeviceMesh) -> Any:
    """Return the process group of all ranks of a mesh of several axes, or of a part of one.

    Where the mesh is a part of another one, all ranks of the larger one must ask for it.
    """
    import torch.distributed as dist

    if devices.size() == dist.get_world_size():
        return dist.group.WORLD
    return devices._flatten().get_group()


def strided_shard(dim: int, split_factor: int) -> Placement:
    """Return DTensor's placement of a dim whose `split_factor` blocks are each split by itself."""
    from torch.distributed.tensor.placement_types import _StridedShard

    _redistribute_blocks()
    return _StridedShard(dim, split_factor=split_factor)


def strided_split_factor(placement: Placement) -> int | None:
    """Return the number of blocks of a placement that `strided_shard` makes, None for others."""
    from torch.distributed.tensor.placement_types import _StridedShard

    return int(placement.split_factor) if isinstance(placement, _StridedShard) else None


@cache
def _redistribute_blocks() -> None:
    """Let torch 2.11 redistribute such a dim one mesh axis after the other, as later releases do.

    It takes every such placement for the order in which mesh axes split a dim, and raises
    ValueError for what cannot be one. Later releases have an error of its own kind for that, and
    then go the way of all other placements, from the innermost axis outwards. On that way 2.11
    does not count such placements as shards, and begins at the outermost axis where it sees none.
    """
    from torch.distributed.tensor import _dtensor_spec, _redistribute

    if hasattr(_dtensor_spec, "_StridedShardNotDecodableError"):
        return
    decoded = _redistribute._gen_transform_infos_non_cached

    def gen_transform_infos(source: Any, target: Any, *options: Any) -> list[Any]:
        try:
            return decoded(source, target, *options)
        except ValueError as error:
            if "use_strided_shard_as_shard_order" not in str(error):
                raise
        planner = _redistribute.get_redistribute_planner(source.device_mesh, source.tensor_meta)
        steps = planner.generate_greedy_transform_infos(source, target)
        return steps if source.num_shards > 1 else steps[::-1]

    vars(_redistribute)["_gen_transform_infos_non_cached"] = gen_transform_infos


def describe_pieces(
    pieces_of: Callable[[DTensor], Any], part_of: Callable[[torch.Tensor, DTensor], Any]
) -> None:
    """Have torch's state dicts and checkpoints ask which pieces of the whole a DTensor holds.

    They take every local part for one rectangle. That is wrong of a dim whose blocks are each split
    by itself: a full state dict was cut elsewhere, and a checkpoint would hold other rows.
    pieces_of: a function that describes a DTensor by torch.distributed.checkpoint's protocol for
    tensors in pieces, or returns None where torch is right. part_of: a function that returns the
    part that this rank holds of a whole tensor if it is split like a DTensor, or likewise None.
    """
    from torch.distributed import _state_dict_utils
    from torch.distributed.tensor import DTensor

    for name in ("__create_write_items__", "__create_chunk_list__", "__get_tensor_shard__"):
        setattr(DTensor, name, _asking(getattr(DTensor, name), name, pieces_of))
    distribute_all = _state_dict_utils._distribute_tensors
    distribute = _state_dict_utils.distribute_tensor

    def distribute_tensors(held: dict[str, Any], keys: list[str], *others: Any) -> None:
        """Cut the tensors that rank 0 has broadcast: (the DTensor to be filled, the whole)."""
        left = []
        for key in keys:
            state = held.get(key)
            target, whole = state if isinstance(state, tuple) else (None, None)
            part = None if target is None else part_of(whole, target)
            if target is None or part is None:
                left.append(key)
            elif target.is_meta:
                held[key] = DTensor(part.detach().clone(), target._spec, requires_grad=False)
            else:
                target.to_local().copy_(part)
                held[key] = target
        distribute_all(held, left, *others)

    def distribute_tensor(whole: torch.Tensor, mesh: Any, placements: Any) -> DTensor:
        """Cut one tensor, of which the first rank's value counts."""
        from torch.distributed.tensor import Replicate

        like = DTensor.from_local(
            whole.new_empty(0).to("meta"), mesh, placements, run_check=False,
            shape=whole.shape, stride=whole.contiguous().stride(),
        )  # fmt: skip
        if part_of(whole, like) is None:
            return distribute(whole, mesh, placements)
        everywhere = distribute(whole, mesh, [Replicate()] * mesh.ndim)
        part = part_of(everywhere.to_local(), like)
        # A part that is a view would keep the whole in memory.
        local = part.clone(memory_format=torch.contiguous_format)
        return DTensor(local, like._spec, requires_grad=False)

    names = vars(_state_dict_utils)
    names["_distribute_tensors"] = distribute_tensors
    names["distribute_tensor"] = distribute_tensor


def _asking(
    method: Callable[..., Any], name: str, pieces_of: Callable[[DTensor], Any]
) -> Callable[..., Any]:
    """Return a method of DTensor that leaves the answer to the DTensor's pieces, if it has such."""

    def asking(tensor: DTensor, *arguments: Any) -> Any:
        pieces = pieces_of(tensor)
        return method(tensor, *arguments) if pieces is None else getattr(pieces, name)(*arguments)

    return asking


# Symbolic sizes.


def expression_of(size: Any) -> sympy.Expr:
    """Return the expression of a symbolic number (SymInt, SymFloat, SymBool)."""
    expression: sympy.Expr = size.node.expr
    return expression


def hint_of(size: Any) -> Any:
    """Return a symbolic number's value for the example inputs; None if it is read from data."""
    return size.node.hint if size.node.has_hint() else None


def is_fixed(size: torch.SymInt) -> bool:
    """Return whether the tracer knows of a symbolic number that it is the example inputs' value."""
    known: Callable[[Any], bool] = import_module(
        "torch.fx.experimental.symbolic_shapes"
    ).statically_known_true
    hint = hint_of(size)
    return hint is not None and known(size == hint)


def guards_of(size: torch.SymInt) -> tuple[Any, ...]:
    """Return the expressions in sizes that the tracer of a size took for true, in order."""
    return tuple(guard.expr for guard in size.node.shape_env.guards)


def remembering_fake_results(enabled: bool) -> AbstractContextManager[Any]:
    """Return a context that sets whether results of ops on fake tensors are cached by size."""
    config = import_module("torch._dynamo").config
    patch: AbstractContextManager[Any] = config.patch(fake_tensor_cache_enabled=enabled)
    return patch


# Autograd.


def in_backward() -> bool:
    """True if this thread runs inside of a backward pass."""
    return backward_pass() != -1


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Call a function when the backward pass that runs now has ended.

    Raises RuntimeError outside of a backward pass.
    """
    torch.autograd.Variable._execution_engine.queue_callback(call)


def backward_pass() -> int:
    """Return the number of the backward pass that runs now in this thread, -1 where none does."""
    return torch._C._current_graph_task_id()


def will_accumulate(node: Any) -> bool:
    """Return whether the backward pass that runs now adds to the `grad` of a leaf.

    node: the leaf's own node, AccumulateGrad. torch.autograd.grad returns gradients instead.
    """
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # it says that it does not tell of leaves under torch.autograd.grad
        return False


def run_when_ready(tensor: torch.Tensor, place: int = 0) -> None:
    """Have a backward pass run the node that made a tensor as soon as its gradients are there.

    Nodes that were recorded last are run first; this one runs before all of those. place: among
    such nodes that are ready at once, the lowest runs first.
    """
    node: Any = tensor.grad_fn
    node._set_sequence_nr(2**64 - 1 - place)


def place_in_backward(tensor: torch.Tensor) -> int:
    """Return the number of the node that made a tensor; higher ones run earlier in a backward
    pass.
    """
    node: Any = tensor.grad_fn
    place: int = node._sequence_nr()
    return place


def run_in_place(tensor: torch.Tensor, place: int) -> None:
    """Have a backward pass run the node that made a tensor as if it were recorded with that number.

    place: from `place_in_backward`, of some other node.
    """
    node: Any = tensor.grad_fn
    node._set_sequence_nr(place)


def references_to(tensor: torch.Tensor) -> tuple[int, int]:
    """Return how many hold a tensor in C++, and how many do in Python, this call included.

    The numbers tell only in comparison with those of another tensor in the same place.
    """
    counted: Any = tensor
    return counted._use_count(), sys.getrefcount(tensor)


def gradient_hooks_of(parameter: torch.Tensor) -> tuple[Any, Any]:
    """Return the dictionaries of the hooks on a leaf's gradient, None where there never was one.

    The first holds those that may change the gradient, the second those that run when it was added.
    """
    return parameter._backward_hooks, parameter._post_accumulate_grad_hooks


def saved_tensors_hooks_are_set() -> bool:
    """True if torch.autograd.graph.saved_tensors_hooks are in force here."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def forward_gradients_are_on() -> bool:
    """Return whether forward-mode derivatives are computed here, as within a `dual_level`."""
    return torch.autograd.forward_ad._current_level >= 0


# Hooks of modules.


def global_call_hooks() -> tuple[dict[int, Any], ...]:
    """Return the dictionaries of the hooks that run around the calls of all modules."""
    module: Any = torch.nn.modules.module
    kinds = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    return tuple([getattr(module, f"_global_{kind}") for kind in kinds])


def call_hooks_of(modules: Iterable[torch.nn.Module]) -> tuple[dict[int, Any], ...]:
    """Return the dictionaries in which modules keep the hooks around a call and its backward."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return tuple([vars(module)[kind] for module in modules for kind in kinds])


def carries_backward_hooks(function: Any) -> bool:
    """True if it is the autograd Function by which hooks run around a module's backward pass."""
    from torch.nn.modules._functions import BackwardHookFunction

    return function is BackwardHookFunction


def hook_handles_so_far() -> int:
    """Return how many handles this process has made: every registered hook makes one."""
    return torch.utils.hooks.RemovableHandle.next_id


# Pipelines.


def pipeline_order(
    schedule: str, ranks: int, per_rank: int, microbatches: int
) -> list[list[tuple[int, str, int]]]:
    """Return what each rank of a pipeline computes, in order, as (stage, kind, micro-batch).

    schedule: the name of one of torch's classes. kind: "F", "B" or, where a backward pass is in two
    halves, "I" and "W". Raises ValueError for numbers that the class does not take.
    """
    from torch.distributed.pipelining import schedules

    base: Any = getattr(schedules, schedule)

    class Table(base):
        """The schedule without its sends, which take long to be put in and are not asked for."""

        def _prepare_schedule_with_comms(self, *args: Any, **kwargs: Any) -> None:
            """Leave the table as it is."""

    stage = SimpleNamespace(
        group_size=ranks,
        group_rank=0,
        num_stages=ranks * per_rank,
        is_first=True,
        is_last=False,
        stage_index=0,
        submod=None,
    )
    several = issubclass(base, schedules.PipelineScheduleMulti)
    table = Table([stage] * per_rank if several else stage, microbatches, loss_fn=None)
    orders: list[list[tuple[int, str, int]]] = []
    for rank in range(ranks):
        orders.append([])
        for action in table.pipeline_order[rank]:
            both = () if action is None else action.sub_actions or (action,)
            orders[-1] += [
                (each.stage_index, each.computation_type.value, each.microbatch_index)
                for each in both
                if each.computation_type.value in ("F", "B", "I", "W")
            ]
    return orders

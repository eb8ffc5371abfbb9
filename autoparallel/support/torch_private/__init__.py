"""The private names of torch that the project uses, which are reached here and nowhere else.

A new release of torch may move any of them without notice; then a file of this package changes, and
no other. Everything is imported from the package itself; its files are by subject.
tests/support/torch_private/ has a file for each, which says of each name how it must behave;
test_adapter.py there reads the sources for others.

Three kinds of names are read where they are used, because they are attributes of objects and torch
documents them: `Tensor._version`; the dictionaries of a module (`_parameters`, `_buffers`,
`_modules`, `_non_persistent_buffers_set`); the keys of `Node.meta` of an exported program (`val`,
`nn_module_stack`, `stack_trace`). test_documented_attributes.py says how these behave.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from autoparallel.support.torch_private.backward_passes import (
    apply_directly,
    at_end_of_backward,
    backward_pass,
    call_hooks_of,
    carries_backward_hooks,
    forward_gradients_are_on,
    global_call_hooks,
    global_step_hooks,
    gradient_hooks_of,
    have_gradient_hooks,
    hook_handles_so_far,
    in_backward,
    is_returned,
    place_in_backward,
    run_in_place,
    run_when_ready,
    saved_tensors_hooks_are_set,
    will_accumulate,
    will_accumulate_all,
)
from autoparallel.support.torch_private.bare_programs import bare_programs
from autoparallel.support.torch_private.compiled_frames import (
    COMPILER,
    break_graph,
    frame_compiler,
    run_as_python,
    set_frame_compiler,
    wants_full_graph,
)
from autoparallel.support.torch_private.distributed_tensors import (
    checkpoint_classes,
    describe_pieces,
    distributed_tensor_like,
    handle_distributed,
    local_part,
    local_parts,
    placed_alike,
    share_local_part,
    strided_shard,
    strided_split_factor,
)
from autoparallel.support.torch_private.fused_attention import (
    attention_and_sums,
    attention_gradients,
    has_attention_sums,
)
from autoparallel.support.torch_private.meta_results import remembering_meta_results
from autoparallel.support.torch_private.process_groups import (
    default_store,
    fake_process_group,
    flattened_group,
    functional_collectives,
    gloo_ranks,
    let_gloo_end,
    pipeline_order,
    set_patience,
)
from autoparallel.support.torch_private.stack_traces import calling_module, keeping_frames
from autoparallel.support.torch_private.symbolic_memory import remembering_arithmetic
from autoparallel.support.torch_private.symbolic_numbers import (
    EXPORT_LOGGERS,
    FAKE_TENSOR_LOGGER,
    as_if_exported,
    expression_of,
    guards_of,
    hint_of,
    is_fixed,
    remembering_fake_results,
)
from autoparallel.support.torch_private.tensor_records import (
    assert_on_device,
    copy_all_,
    laid_end_to_end,
    multiply_all_,
    norms_of,
    parts_of_norms,
    references_to,
    references_to_each,
    storage_key,
    wrapper_tensor,
)
from autoparallel.support.torch_private.torch_operators import (
    NN_BINDINGS,
    custom_op_functions,
    differentiates_custom_op,
    dispatch_registrations,
    has_backward,
    has_meta_kernel,
    has_torch_binding,
    is_composite,
    is_custom_op,
    nn_binding,
    schema_of,
    truncated_normal_replaced,
)
from autoparallel.support.torch_private.watching_modes import (
    current_dispatch_mode,
    current_function_mode,
    default_device_kind,
    in_function_transform,
    outside_transforms,
    plain_ops_of,
    replaced_transforms,
    users_dispatch_modes,
    users_function_modes,
    with_function_overrides,
    without_function_modes,
    without_function_overrides,
    without_modes,
)

if TYPE_CHECKING:
    from torch._C._functorch import is_functorch_wrapped_tensor as is_functorch_wrapped_tensor
    from torch._ops import OpOverload as OpOverload
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
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

    from autoparallel.support.torch_private.lazy_stage import LazyStage as LazyStage

# The module that has a name, imported when the name is first asked for.
_HOMES = {
    # Runs an op on tensors that have sizes and strides but no data.
    "FakeTensorMode": "torch._subclasses.fake_tensor",
    # A stage of a pipeline that has memory for what it receives only while it is needed.
    "LazyStage": "autoparallel.support.torch_private.lazy_stage",
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


__all__ = [
    "COMPILER",
    "EXPORT_LOGGERS",
    "FAKE_TENSOR_LOGGER",
    "NN_BINDINGS",
    "FakeTensorMode",
    "LazyStage",
    "OpOverload",
    "PythonPrinter",
    "ShapeEnv",
    "StorageWeakRef",
    "TorchDispatchMode",
    "apply_directly",
    "as_if_exported",
    "assert_on_device",
    "at_end_of_backward",
    "attention_and_sums",
    "attention_gradients",
    "backward_pass",
    "bare_programs",
    "break_graph",
    "call_hooks_of",
    "calling_module",
    "carries_backward_hooks",
    "checkpoint_classes",
    "copy_all_",
    "current_dispatch_mode",
    "current_function_mode",
    "custom_op_functions",
    "decompose",
    "default_device_kind",
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
    "global_step_hooks",
    "gloo_ranks",
    "gradient_hooks_of",
    "guards_of",
    "handle_distributed",
    "has_attention_sums",
    "has_backward",
    "has_meta_kernel",
    "has_torch_binding",
    "have_gradient_hooks",
    "hint_of",
    "hook_handles_so_far",
    "in_backward",
    "in_function_transform",
    "is_composite",
    "is_custom_op",
    "is_fixed",
    "is_functorch_wrapped_tensor",
    "is_returned",
    "keeping_frames",
    "laid_end_to_end",
    "let_gloo_end",
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
    "plain_ops_of",
    "references_to",
    "references_to_each",
    "remembering_arithmetic",
    "remembering_fake_results",
    "remembering_meta_results",
    "replaced_transforms",
    "run_as_python",
    "run_in_place",
    "run_when_ready",
    "saved_tensors_hooks_are_set",
    "schema_of",
    "set_frame_compiler",
    "set_patience",
    "share_local_part",
    "storage_key",
    "strided_shard",
    "strided_split_factor",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "truncated_normal_replaced",
    "users_dispatch_modes",
    "users_function_modes",
    "wants_full_graph",
    "will_accumulate",
    "will_accumulate_all",
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

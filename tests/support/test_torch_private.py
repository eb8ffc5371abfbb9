"""Torch's private names do what the project relies on, and no other is used.

A test that fails under a new release of torch says which name changed and what depended on it.
"""

from __future__ import annotations

import ast
import gc
import importlib
import logging
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import run_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from autoparallel.support import torch_private

ROOT = Path(__file__).parents[2]
aten = torch.ops.aten


@torch.library.custom_op("private_names::scale", mutates_args=())
def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


@torch.library.custom_op("private_names::plain", mutates_args=())
def plain(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def fake_scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.empty_like(x)


def keep_factor(ctx, inputs, output) -> None:
    ctx.factor = inputs[1]


def scale_backward(ctx, grad):
    return grad * ctx.factor, None


scale.register_fake(fake_scale)
scale.register_autograd(scale_backward, setup_context=keep_factor)


def test_modes_can_be_left() -> None:
    """A Function's passes are run without the modes that are at work around them."""
    with torch_private.FakeTensorMode() as mode:
        with torch_private.without_modes():
            assert torch_private.current_dispatch_mode() is None
            assert type(torch.ones(2)) is torch.Tensor
        assert torch_private.current_dispatch_mode() is mode
    seen: list[object] = []

    class Counts(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Counts():
        with torch_private.without_function_modes():
            torch.ones(2)
        assert not seen
        torch.ones(2)
        assert seen == [torch.ones]


def test_functions_of_subclasses_can_be_left_out() -> None:
    """The hot path reads attributes of split tensors without asking their class."""
    seen: list[object] = []

    class Counts(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    tensor = torch.ones(2).as_subclass(Counts)
    seen.clear()
    with torch_private.without_function_overrides():
        assert not tensor.requires_grad
        assert not seen
        # Hooks of the user's run within, and compute with such tensors.
        with torch_private.with_function_overrides():
            assert not tensor.requires_grad
        assert len(seen) == 1
        assert not tensor.requires_grad
    assert len(seen) == 1
    assert not tensor.requires_grad
    assert len(seen) == 2


def test_the_function_of_backward_hooks_is_known() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.register_full_backward_hook(lambda *_: None)
    y = layer(torch.ones(1, 2, requires_grad=True))
    assert torch_private.carries_backward_hooks(type(y.grad_fn)._forward_cls)
    assert not torch_private.carries_backward_hooks(torch.autograd.Function)


@pytest.fixture
def mesh(tmp_path):
    """Return a device mesh of this one process."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def exported(forward, *inputs):
    """Return the exported program of a function of tensors whose sizes are all symbolic."""

    class Module(nn.Module):
        def forward(self, *inputs):
            return forward(*inputs)

    free = torch.export.Dim.AUTO
    shapes = (tuple(dict.fromkeys(range(x.dim()), free) for x in inputs),)
    return torch.export.export(Module(), inputs, strict=False, dynamic_shapes=shapes)


# Only the adapter names them.


ATTRIBUTES = {
    "_C",
    "_c10d_functional",
    "_can_decompose",
    "_cdata",
    "_codegen",
    "_execution_engine",
    "_local_tensor",
    "_make_wrapper_subclass",
    "_optimized_summation",
    "_schema",
    "_spec",
}


def private_names(path: Path) -> list[str]:
    """Return the private names of torch in a file, with their lines."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if re.fullmatch(r"torch(\.\w+)+", text):
                names = [text]
            elif node.attr in ATTRIBUTES:
                names = [f"torch.{node.attr}"]
        elif isinstance(node, ast.Constant) and str(node.value).startswith("torch."):
            names = [str(node.value).split("(")[0]]
        parts = [part for name in names for part in name.split(".")[1:]]
        if any(re.match(r"_(?!_)", part) for part in parts):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {names[0]}")
    return found


def test_the_innermost_modes_are_told() -> None:
    """None outside of all modes, and the one that was entered last inside."""

    class Ops(torch_private.TorchDispatchMode):  # type: ignore[name-defined, misc]
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return function(*args, **(kwargs or {}))

    class Calls(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return function(*args, **(kwargs or {}))

    assert torch_private.current_dispatch_mode() is None
    assert torch_private.current_function_mode() is None
    with Ops() as ops, Ops() as inner, Calls() as calls:
        assert torch_private.current_dispatch_mode() is inner is not ops
        assert torch_private.current_function_mode() is calls


def test_private_names_are_used_in_one_package() -> None:
    """So that a new release of torch breaks files of one folder."""
    adapter = Path(torch_private.__file__).parent
    used = []
    for folder in ("autoparallel", "planners", "megatron_rules", "examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.parent != adapter:
                used += private_names(path)
    assert not used
    assert all(private_names(path) for path in adapter.glob("*.py"))


def test_every_public_name_of_the_adapter_is_importable_from_it() -> None:
    """Its files are by subject, and nobody needs to know in which one a name is."""
    for path in sorted(Path(torch_private.__file__).parent.glob("*.py")):
        if path.stem != "__init__":
            module = importlib.import_module(f"{torch_private.__name__}.{path.stem}")
            assert set(module.__all__) <= set(torch_private.__all__), path


def test_every_name_of_the_adapter_is_tested_here() -> None:
    """A name that is added comes with a test of what it does."""
    text = Path(__file__).read_text()
    missing = [name for name in torch_private.__all__ if f"torch_private.{name}" not in text]
    assert not missing
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        torch_private.nothing  # noqa: B018


# Ops and their schemas.


def test_an_op_has_one_schema_that_says_what_it_writes() -> None:
    schema = torch_private.schema_of(aten.add_.Tensor)
    assert schema.is_mutable
    assert [argument.name for argument in schema.arguments] == ["self", "other", "alpha"]
    assert schema.arguments[0].alias_info.is_write
    assert schema.arguments[1].alias_info is None
    assert schema.arguments[2].default_value == 1
    assert str(schema).startswith("aten::add_.Tensor(Tensor(a!) self")
    assert schema.name == "aten::add_"
    assert not torch_private.schema_of(aten.add.Tensor).is_mutable
    assert str(torch_private.schema_of(aten.split.Tensor).returns[0].type).startswith("List[")
    assert torch_private.schema_of(len) is None
    assert torch_private.schema_of(None) is None


def test_calls_of_an_exported_program_are_op_overloads() -> None:
    program = exported(lambda x: torch.sin(x), torch.ones(3))
    (call,) = (node for node in program.graph.nodes if node.op == "call_function")
    assert isinstance(call.target, torch_private.OpOverload)
    assert str(call.target) == "aten.sin.default"
    assert (call.target.namespace, call.target.tags) == ("aten", aten.sin.default.tags)
    assert not isinstance(aten.sin, torch_private.OpOverload)


def test_composite_ops_are_those_that_run_others() -> None:
    """hstack is defined by cat; cat by no other op."""
    assert torch_private.is_composite(aten.hstack.default)
    assert not torch_private.is_composite(aten.cat.default)
    x = torch.ones(2)
    assert torch.equal(aten.hstack.default.decompose([x, x]), torch.ones(4))


def test_tracing_may_put_other_ops_in_the_place_of_one() -> None:
    """The table is asked for every op while something is traced, and only then."""
    assert torch_private.get_proxy_mode() is None
    seen = []

    def forward(x):
        seen.append(torch_private.get_proxy_mode())
        with torch_private.decompose({aten.sin.default: lambda x: aten.cos.default(x)}):
            return torch.sin(x)

    program = exported(forward, torch.ones(3))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls == ["aten.cos.default"]
    assert all(mode is not None for mode in seen)


def test_the_dispatcher_tells_kernels_apart() -> None:
    """The text changes when an op is given another kernel."""
    library = torch.library.Library("private_names", "FRAGMENT")
    library.define("registered(Tensor x) -> Tensor")
    before = torch_private.dispatch_registrations("private_names::registered")
    library.impl("registered", lambda x: x.clone(), "CPU")
    after = torch_private.dispatch_registrations("private_names::registered")
    assert before != after
    assert "CPU" in after
    assert "CPU" not in before


def test_a_custom_op_shows_its_functions() -> None:
    assert torch_private.is_custom_op("private_names::scale")
    assert not torch_private.is_custom_op("aten::sin")
    functions = torch_private.custom_op_functions("private_names::scale")
    assert functions is not None
    kernel, fake, context, backward = functions
    assert kernel.__name__ == "scale"
    assert fake is fake_scale
    assert (context, backward) == (keep_factor, scale_backward)
    rest = torch_private.custom_op_functions("private_names::plain")
    assert rest is not None
    assert rest[1:] == (None, None, None)
    assert torch_private.custom_op_functions("aten::sin") is None


def test_functions_that_differentiate_custom_ops_are_recognized() -> None:
    """Torch makes one for each op, with the op's name in its own."""
    y = torch.ops.private_names.scale(torch.ones(2, requires_grad=True), 2.0)
    made = type(y.grad_fn)._forward_cls
    assert "private_names" in made.__name__
    assert torch_private.differentiates_custom_op(made)

    class Own(torch.autograd.Function):
        pass

    assert not torch_private.differentiates_custom_op(Own)


def test_custom_ops_say_whether_they_have_a_backward() -> None:
    assert torch_private.has_backward("private_names::scale")
    assert not torch_private.has_backward("private_names::plain")
    assert torch_private.has_backward("aten::sin")


def test_a_fake_process_group_has_ranks_that_do_not_run() -> None:
    """In a process of its own, because there is one default group in a process."""
    program = (
        "import torch, torch.distributed as dist\n"
        "from autoparallel.support import torch_private\n"
        "torch_private.fake_process_group(1, 4)\n"
        "x = torch.ones(3)\n"
        "dist.all_reduce(x)\n"
        "print(dist.get_rank(), dist.get_world_size())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "4"]


def test_a_function_that_is_applied_directly_is_recorded() -> None:
    """What its forward gets is what was passed, numbers and lists included."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factors):
            ctx.factors = factors
            return x * factors[0]

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.factors[0], None

    x = torch.ones(2, requires_grad=True)
    result = torch_private.apply_directly(Scaled)(x, [3.0])
    result.sum().backward()
    assert x.grad.tolist() == [3.0, 3.0]


def test_functional_collectives_are_past_autograd(mesh) -> None:
    """What calls them has a backward pass of its own."""
    ops, group = torch_private.functional_collectives(), mesh.get_group()
    x = torch.ones(2, requires_grad=True)
    result = ops.wait_tensor(ops.all_reduce(x, "sum", group.group_name))
    assert result.grad_fn is None
    assert not result.requires_grad


def test_functional_collectives_return_what_they_make(mesh) -> None:
    """One rank: every collective is the identity, and leaves its operand alone."""
    ops, group = torch_private.functional_collectives(), mesh.get_group()
    x = torch.arange(6.0).view(1, 6)
    for made in (
        ops.all_reduce(x, "sum", group.group_name),
        ops.all_reduce(x, "max", group.group_name),
        ops.all_gather_into_tensor(x, 1, group.group_name),
        ops.reduce_scatter_tensor(x, "sum", 1, group.group_name),
        ops.all_to_all_single(x.view(-1), [6], [6], group.group_name).view(1, 6),
    ):
        result = ops.wait_tensor(made)
        assert result.data_ptr() != x.data_ptr()
        assert torch.equal(result, x)


def test_python_bindings_are_told_from_functions_around_them() -> None:
    """torch.split is written in Python around the op; torch.nn's ops have a module of their own."""
    assert torch_private.has_torch_binding("mm")
    assert torch_private.has_torch_binding("sin")
    assert not torch_private.has_torch_binding("linear")
    assert torch_private.nn_binding("linear") is nn.functional.linear
    assert torch_private.nn_binding("sin") is None
    binding = eval(f"{torch_private.NN_BINDINGS}.max_pool2d_with_indices", {"torch": torch})
    x = torch.rand(1, 4, 4)
    for made, expected in zip(
        binding(x, 2), aten.max_pool2d_with_indices.default(x, 2), strict=True
    ):
        assert torch.equal(made, expected)


# Tensors.


def test_an_assertion_on_the_device_fails_for_false() -> None:
    torch_private.assert_on_device(torch.tensor(True), "too large")
    with pytest.raises(RuntimeError):
        torch_private.assert_on_device(torch.tensor(False), "too large")


def test_the_memory_of_a_tensor_is_known_by_its_key() -> None:
    """Views have the key of what they are views of, also without data."""
    x, other = torch.zeros(2, 3), torch.zeros(2, 3)
    assert torch_private.storage_key(x) == torch_private.storage_key(x.t()[1:])
    assert torch_private.storage_key(x) == torch_private.storage_key(x.untyped_storage())
    assert torch_private.storage_key(x) != torch_private.storage_key(other)
    with torch_private.FakeTensorMode():
        fake, second = torch.empty(2, 3), torch.empty(2, 3)
        assert torch_private.storage_key(fake) == torch_private.storage_key(fake.view(6))
        assert torch_private.storage_key(fake) != torch_private.storage_key(second)


def test_a_weak_reference_keeps_the_key_of_memory_from_another() -> None:
    """The memory is freed, but nothing that is made later is taken for it."""
    x = torch.zeros(1000)
    key = torch_private.storage_key(x)
    reference = torch_private.StorageWeakRef(x.untyped_storage())
    assert not reference.expired()
    del x
    gc.collect()
    assert reference.expired()
    later = [torch.zeros(1000) for _ in range(100)]
    assert key not in {torch_private.storage_key(tensor) for tensor in later}


def test_fake_tensors_have_sizes_strides_and_no_data() -> None:
    with torch_private.FakeTensorMode():
        x = torch.empty(3, 4, requires_grad=True)
        made = (x.t() @ torch.empty(3, 5)).t()
    assert (made.shape, made.stride(), made.requires_grad) == ((5, 4), (1, 5), True)
    assert made.untyped_storage().nbytes() == 4 * 5 * 4


def test_fake_tensors_of_one_mode_begin_a_trace_with_symbolic_sizes() -> None:
    """A module whose parameters are fake is exported: the mode needs a place for its symbols."""
    with torch_private.FakeTensorMode(
        allow_non_fake_inputs=True, shape_env=torch_private.ShapeEnv()
    ):
        layer = nn.Linear(3, 2)
    free = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(layer, (torch.ones(4, 3),), strict=False, dynamic_shapes=free)
    output = next(node for node in program.graph.nodes if node.op == "output")
    assert isinstance(output.args[0][0].meta["val"].shape[0], torch.SymInt)


def test_a_wrapper_tensor_has_a_size_and_no_memory() -> None:
    class Described(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError

    size = torch.Size((10**6, 10**6))
    made = torch_private.wrapper_tensor(Described, size, torch.float64, torch.device("cpu"))
    assert isinstance(made, Described)
    assert (made.shape, made.dtype, made.device) == (size, torch.float64, torch.device("cpu"))


def test_a_dispatch_mode_sees_ops_below_autograd_and_autocast() -> None:
    seen: list[str] = []

    class Recorder(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x = torch.ones(2, 2, requires_grad=True)
    with Recorder():
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            made = x @ x
        made.sum().backward()
    assert seen[:3] == ["aten._to_copy.default", "aten._to_copy.default", "aten.mm.default"]
    assert seen.count("aten.mm.default") == 3


def test_nested_arguments_come_apart_and_together() -> None:
    x, y = torch.ones(1), torch.zeros(1)
    nested = ([x, {"key": (y, 3)}], None)
    leaves, structure = torch_private.tree_flatten(nested)
    assert leaves[0] is x
    assert leaves[1] is y
    assert leaves[2:] == [3, None]
    assert torch_private.tree_leaves(nested) == leaves
    assert torch_private.tree_unflatten(leaves, structure) == nested
    assert torch_private.tree_map(lambda leaf: 2 if leaf == 3 else leaf, nested)[0][1]["key"] == (
        y,
        2,
    )


def test_tensors_inside_a_function_transform_are_recognized() -> None:
    seen = []

    def look(x):
        seen.append(torch_private.is_functorch_wrapped_tensor(x))
        seen.append(torch_private.in_function_transform())
        return x * 2

    torch.func.vmap(look)(torch.ones(3))
    look(torch.ones(3))
    assert seen == [True, True, False, False]


# DTensor.


def gathered_blocks(_rank: int) -> list[bool]:
    """Check that dims that are split block by block, on one and two mesh axes, are put in order."""
    made = []
    # What one rank writes into the store, the others read.
    store = torch_private.default_store()
    if _rank == 0:
        store.set("a key of this test", "some words")
    store.wait(["a key of this test"])
    made.append(store.get("a key of this test") == b"some words")
    x = torch.arange(48.0).view(24, 2)
    cube = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("a", "b", "c"))
    for devices, size in ((cube, 4), (cube["b", "c"], 2)):
        group = torch_private.flattened_group(devices)
        made.append(torch.distributed.get_world_size(group) == size)
    line, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    thrice, inner = torch_private.strided_shard(0, 3), torch_private.strided_shard(0, 6)
    for mesh, placements in (
        (line, [thrice]),
        (grid, [thrice, Replicate()]),
        (grid, [thrice, inner]),
        (grid, [Shard(1), thrice]),
    ):
        part = x
        for axis, placement in enumerate(placements):
            ranks, own = mesh.size(axis), mesh.get_local_rank(axis)
            if placement in (thrice, inner):
                blocks = part.split(part.shape[0] // 3)
                part = torch.cat([block.chunk(ranks)[own] for block in blocks])
            elif placement == Shard(1):
                part = part.chunk(ranks, 1)[own]
        split = DTensor.from_local(part.contiguous(), mesh, placements, run_check=False)
        made += [
            torch.equal(split.full_tensor(), x),
            torch.equal((split.detach() * 2).full_tensor(), x * 2),
            tuple(split.shape) == (24, 2),
        ]
    return made


def test_a_dim_that_is_split_block_by_block_is_gathered_in_order() -> None:
    """split_factor counts the blocks; each is split over the ranks by itself."""
    placement = torch_private.strided_shard(0, 3)
    assert placement == torch_private.strided_shard(0, 3)
    assert placement not in (Shard(0), torch_private.strided_shard(0, 2))
    assert torch_private.strided_split_factor(placement) == 3
    assert torch_private.strided_split_factor(Shard(0)) is None
    for made in run_processes(gathered_blocks, 4):
        assert all(made)


def cut_by_torch(rank: int, folder: Path) -> list[bool]:
    """Have torch broadcast, distribute and save a dim in two blocks, of one element and a half."""
    from torch.distributed.checkpoint import load, save
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    mesh, rows = init_device_mesh("cpu", (2,)), [[0, 1, 3, 4], [2, 5]][rank]
    whole = torch.arange(6.0)
    asked = []

    def pieces_of(tensor: DTensor) -> object | None:
        asked.append(tensor.placements)
        return None

    def part_of(value: torch.Tensor, like: DTensor) -> torch.Tensor | None:
        return value[rows] if like.placements[0] != Shard(0) else None

    torch_private.describe_pieces(pieces_of, part_of)
    found = []
    for placement, expected in (
        (torch_private.strided_shard(0, 2), rows),
        (Shard(0), [[0, 1, 2], [3, 4, 5]][rank]),
    ):
        for broadcast in (True, False):
            part = torch.zeros(len(expected))
            held = DTensor.from_local(part, mesh, [placement], shape=(6,), stride=(1,))
            module = nn.Module()
            module.weight = nn.Parameter(held)
            given = {"weight": whole} if rank == 0 or not broadcast else {}
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
            set_model_state_dict(module, given, options=options)
            found.append(torch.equal(module.weight.to_local(), whole[expected]))
    # Where there are no pieces, torch answers itself: here for a plain split.
    held = DTensor.from_local(whole[expected], mesh, [Shard(0)])
    chunk = ChunkStorageMetadata(torch.Size([3 * rank]), torch.Size([3]))
    found.append(held.__create_chunk_list__() == [chunk] and asked == [(Shard(0),)])
    save({"x": held}, checkpoint_id=folder)
    read = DTensor.from_local(torch.zeros(3), mesh, [Shard(0)])
    load({"x": read}, checkpoint_id=folder)
    return [*found, torch.equal(read.full_tensor(), whole)]


def test_torch_asks_for_the_pieces_of_a_dtensor(tmp_path: Path) -> None:
    """Its state dicts ask for the part, its checkpoints for the pieces; None leaves it to torch."""
    for found in run_processes(cut_by_torch, 2, tmp_path):
        assert all(found), found


def test_the_local_part_of_a_dtensor_is_what_it_holds(mesh) -> None:
    x = torch.arange(6.0)
    made = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    local = torch_private.local_part(made)
    assert list(torch_private.local_parts([made, made])) == [local, local]
    local.mul_(2)
    assert torch.equal(made.full_tensor(), torch.arange(6.0) * 2)
    assert local.data_ptr() == x.data_ptr()


def test_a_dtensor_keeps_its_identity_with_other_memory(mesh) -> None:
    """An optimizer goes on with the parameter that it knows."""
    parameter = nn.Parameter(DTensor.from_local(torch.zeros(6), mesh, [Replicate()]))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    source = nn.Parameter(DTensor.from_local(torch.ones(6), mesh, [Shard(0)]))
    torch_private.share_local_part(parameter, source)
    assert parameter.placements == (Shard(0),)
    parameter.grad = torch_private.distributed_tensor_like(torch.ones(6) * 3, parameter)
    assert parameter.grad.placements == (Shard(0),)
    assert not parameter.grad.requires_grad
    optimizer.step()
    assert torch.equal(torch_private.local_part(source), torch.full((6,), -2.0))


def test_dtensors_that_are_placed_alike_are_known(mesh) -> None:
    """By the description that they share, or by what it says."""
    one, other = (DTensor.from_local(torch.zeros(6), mesh, [Shard(0)]) for _ in range(2))
    like = torch_private.distributed_tensor_like(torch.ones(6), one, True)
    assert like.requires_grad
    assert torch_private.placed_alike(like, one)
    assert torch_private.placed_alike(one, other)
    whole = DTensor.from_local(torch.zeros(6), mesh, [Replicate()])
    assert not torch_private.placed_alike(one, whole)


def test_an_op_of_dtensor_can_be_handled(mesh) -> None:
    """The op's overload, its arguments and keyword arguments are given."""
    split = DTensor.from_local(torch.zeros(6), mesh, [Replicate()])
    handlers = DTensor._op_dispatcher._custom_op_handlers
    op = torch.ops.aten.hardswish.default
    try:
        seen: list[object] = []
        torch_private.handle_distributed({op: lambda *given: seen.append(given) or split})
        assert torch.ops.aten.hardswish(split) is split
        assert seen == [(op, (split,), {})]
    finally:
        del handlers[op]


# Symbolic sizes, and what an exported program says of its nodes.


def test_symbolic_sizes_have_expressions_hints_and_guards() -> None:
    program = exported(lambda x, y: torch.cat([x, x]) + y, torch.ones(3, 4), torch.ones(6, 4))
    first, second = (node.meta["val"] for node in program.graph.nodes if node.op == "placeholder")
    (result,) = (n.meta["val"] for n in program.graph.nodes if str(n.target) == "aten.add.Tensor")
    rows = torch_private.expression_of(first.shape[0])
    assert isinstance(rows, sympy.Symbol)
    assert torch_private.expression_of(result.shape[0]) == 2 * rows
    assert torch_private.hint_of(first.shape[0]) == 3
    assert torch_private.hint_of(result.shape[0]) == 6
    guards = torch_private.guards_of(first.shape[0])
    assert all(isinstance(guard, sympy.Basic) for guard in guards)
    known = {torch_private.expression_of(second.shape[0]), 2 * rows}
    assert len(known) == 1 or any(guard.atoms(sympy.Symbol) for guard in guards)


def test_a_size_that_other_sizes_decide_is_fixed() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x[:, ::4].reshape(x.shape[0], 1)  # so that the other dim has 4 elements at most

    program = exported(forward, torch.ones(3, 4))
    sizes = {
        str(node.target): node.meta["val"].shape
        for node in program.graph.nodes
        if isinstance(node.meta.get("val"), torch.Tensor)
    }
    (x,) = (n.meta["val"] for n in program.graph.nodes if n.op == "placeholder")
    kept = [size for size in sizes["aten.slice.Tensor"] if isinstance(size, torch.SymInt)]
    assert [torch_private.is_fixed(size) for size in kept] == [False, True]
    assert not torch_private.is_fixed(x.shape[1])


def test_a_size_that_data_decide_has_no_hint() -> None:
    program = exported(lambda x: x.nonzero(), torch.ones(3, 4))
    (made,) = (
        n.meta["val"] for n in program.graph.nodes if str(n.target) == "aten.nonzero.default"
    )
    assert torch_private.hint_of(made.shape[0]) is None


def test_expressions_print_as_python() -> None:
    size = sympy.Symbol("n", integer=True, positive=True)
    printed = torch_private.PythonPrinter().doprint(3 * size + sympy.Max(size, 2))
    assert [eval(printed, {"n": n, "max": max}) for n in (1, 5)] == [5, 20]
    floored = sympy.floor(sympy.Rational(1, 2) * size)
    assert "n" in torch_private.PythonPrinter().doprint(floored)


@pytest.mark.parametrize("enabled", [True, False])
def test_results_of_fake_tensors_are_remembered_or_not(enabled: bool) -> None:
    def sizes_found() -> int:
        """Count the calls of the op's own function for the same sizes."""
        asked = []
        library = torch.library.Library("private_names", "FRAGMENT")
        name = f"asked_{enabled}".lower()
        if not hasattr(torch.ops.private_names, name):
            library.define(f"{name}(Tensor x) -> Tensor", tags=[torch.Tag.pt2_compliant_tag])

        @torch.library.register_fake(f"private_names::{name}", lib=library)
        def fake(x):
            asked.append(x.shape)
            return torch.empty_like(x)

        with torch_private.remembering_fake_results(enabled), torch_private.FakeTensorMode():
            for _ in range(3):
                getattr(torch.ops.private_names, name)(torch.empty(3))
        return len(asked)

    before = torch._dynamo.config.fake_tensor_cache_enabled
    with torch_private.remembering_fake_results(enabled):
        assert torch._dynamo.config.fake_tensor_cache_enabled is enabled
        assert torch_private.FakeTensorMode().cache_enabled is enabled
    assert torch._dynamo.config.fake_tensor_cache_enabled is before
    if not enabled:
        assert sizes_found() == 3


def test_kernels_for_tensors_without_device() -> None:
    own = [aten.mm.default, aten.add.Tensor, aten.sum.dim_IntList]
    assert all(map(torch_private.has_meta_kernel, own))
    others = [aten.linear.default, aten.matmul.default, aten.slice.Tensor, aten.softmax.int]
    assert not any(map(torch_private.has_meta_kernel, others))


def test_bare_programs_have_no_metadata_of_tensors() -> None:
    """Within, no node has them; afterwards, in other threads too, torch notes them as ever."""

    def metadata() -> list[Any]:
        program = exported(lambda x: x.sin().cos(), torch.ones(3, 4))
        return [node.meta.get("tensor_meta") for node in program.graph.nodes if node.op != "output"]

    with torch_private.bare_programs():
        with torch_private.bare_programs():
            assert metadata() == [None] * 3
        assert metadata() == [None] * 3
        with ThreadPoolExecutor(1) as pool:
            elsewhere = pool.submit(metadata).result()
    for noted in (elsewhere, metadata()):
        assert [tuple(item.shape)[1] for item in noted] == [4, 4, 4]


def two_ways(x: torch.Tensor) -> torch.Tensor:
    """Return a result of which a part is computed without gradients, by a graph of its own."""
    with torch.no_grad():
        y = x.sin().reshape(-1)
    return (x * 2).reshape(-1) + y


def test_bare_programs_write_their_code_when_it_is_asked_for(monkeypatch) -> None:
    """Within, no Python is compiled; whoever runs a graph, or asks for its code, has it all."""
    written: list[str] = []
    original = torch.fx.Graph.python_code

    def noted(graph: Any, *args: Any, **kwargs: Any) -> Any:
        written.append(str(graph))
        return original(graph, *args, **kwargs)

    monkeypatch.setattr(torch.fx.Graph, "python_code", noted)
    plain = exported(two_ways, torch.ones(3, 4))
    assert written
    written.clear()
    with torch_private.bare_programs():
        bare = exported(two_ways, torch.ones(3, 4))
        assert not written
        assert bare.graph_module.code == plain.graph_module.code
        assert len(written) == 2  # one of them is of the graph inside
    assert str(bare) == str(plain)
    x = torch.rand(5, 4)
    torch.testing.assert_close(bare.module()(x), two_ways(x))
    assert [type(module.code) for module in bare.graph_module.children()] == [str]
    # A graph that is edited and written again runs as it is now.
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    with torch_private.bare_programs():
        (call,) = (node for node in graph.graph.nodes if node.op == "call_module")
        call.op, call.target = "call_function", torch.neg
        graph.recompile()
    assert graph(torch.ones(1)).item() == -1


def test_arithmetic_with_sizes_is_remembered(monkeypatch) -> None:
    """Within, each result is computed once; the program, with all that is known, is the same."""
    from torch.fx.experimental.sym_node import SymNode

    computed: list[tuple[Any, Any]] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = (x.reshape(-1, x.shape[-1]) * 2).view(x.shape)
        return x.reshape(x.shape[0] * 2, -1) if x.shape[1] % 2 == 0 else x

    plain = exported(forward, torch.ones(3, 4, 5))
    original = SymNode.maybe_as_int

    def noted(number: Any) -> Any:
        computed.append((number.shape_env, number._expr))
        return original(number)

    monkeypatch.setattr(SymNode, "maybe_as_int", noted)
    monkeypatch.setattr(SymNode, "_mul", SymNode._mul)
    method = SymNode._mul
    with torch_private.remembering_arithmetic():
        with torch_private.remembering_arithmetic():
            memory = exported(forward, torch.ones(3, 4, 5))
        with ThreadPoolExecutor(1) as pool:
            elsewhere = pool.submit(exported, forward, torch.ones(3, 4, 5)).result()
        here = [key for key in computed if key[0] is not size_of(elsewhere).node.shape_env]
    assert len(computed) - len(here) > 4 * len(here) > 0
    assert SymNode._mul is method
    assert SymNode.maybe_as_int is noted
    for program in (memory, elsewhere):
        assert str(program) == str(plain)
        guards = map(torch_private.guards_of, map(size_of, (program, plain)))
        assert len({str(each) for each in guards}) == 1


def test_remembered_sizes_follow_what_becomes_known() -> None:
    """A size that was symbolic is a number as soon as a tracer knows it, and in no other trace."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        before = x.reshape(-1, 2)
        assert x.shape[0] == 6  # it is fixed here
        return before * x.reshape(-1, 2)[: x.shape[0]].shape[0]

    with torch_private.remembering_arithmetic():
        fixed = exported(forward, torch.ones(6, 4))
        free = exported(lambda x: x.reshape(-1, 2) * 2, torch.ones(6, 4))
    assert size_of(fixed, 0) == 6
    assert torch_private.expression_of(size_of(free)).is_Symbol


def size_of(program: Any, dim: int | None = None) -> Any:
    """Return a size of a program's input: the one of a dim, or the first symbolic one."""
    (node,) = (node for node in program.graph.nodes if node.op == "placeholder")
    sizes = node.meta["val"].shape
    if dim is not None:
        return sizes[dim]
    return next(size for size in sizes if isinstance(size, torch.SymInt))


def test_nodes_of_an_exported_program_say_where_they_come_from() -> None:
    class Inner(nn.Module):
        def forward(self, x):
            return torch.sin(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x)

    program = torch.export.export(Outer(), (torch.ones(3),), strict=False)
    (call,) = (node for node in program.graph.nodes if node.op == "call_function")
    assert isinstance(call.meta["val"], torch.Tensor)
    assert [path for path, _ in call.meta["nn_module_stack"].values()] == ["", "inner"]
    last = [row for row in call.meta["stack_trace"].splitlines() if "File " in row][-1]
    assert Path(__file__).name in last
    assert re.search(r'File "[^"]+", line \d+', last)


def test_frames_of_more_functions_are_kept() -> None:
    """Of a file that is asked for, inside of the forward that is told by its file."""

    class Model(nn.Module):
        def forward(self, x):
            return self.helper(x)

        def helper(self, x):
            return torch.sin(x)

    def functions() -> list[str]:
        program = torch.export.export(Model(), (torch.ones(3),), strict=False)
        (call,) = (node for node in program.graph.nodes if node.op == "call_function")
        return re.findall(r"in (\w+)$", call.meta.get("stack_trace", ""), re.MULTILINE)

    assert functions() == ["forward"]
    with torch_private.keeping_frames(lambda file: file == __file__, inside=torch.nn.__file__):
        kept = functions()
    assert kept[-2:] == ["forward", "helper"]
    with torch_private.keeping_frames(lambda file: file == __file__, inside=__file__):
        assert functions() == []
    assert functions() == ["forward"]


class Reshaped(nn.Module):
    """Calls modules, functions and methods, one of which is named as a forward is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4))

    def helped(self, x: torch.Tensor) -> torch.Tensor:
        def forward(x: torch.Tensor) -> torch.Tensor:
            return x.transpose(0, 1).softmax(0)

        return torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = x.abs().sum(0, keepdim=True)
        return self.helped(self.layers(x) / scale)


@pytest.mark.parametrize("inside", [__file__, torch.export.__file__, torch.nn.functional.__file__])
@pytest.mark.parametrize("kept", [__file__, torch.nn.functional.__file__, "none"])
def test_frames_that_are_not_kept_are_not_described(kept: str, inside: str) -> None:
    """The others are those that are left of a whole stack; another thread has whole ones."""
    x, dims = torch.ones(3, 4), ({0: torch.export.Dim.AUTO},)

    def stacks() -> list[str]:
        program = torch.export.export(Reshaped(), (x,), strict=False, dynamic_shapes=dims)
        graphs = [getattr(m, "graph", None) for m in program.graph_module.modules()]
        nodes = [node for graph in graphs if graph is not None for node in graph.nodes]
        return [f"{node.name}: {node.meta.get('stack_trace', '')}" for node in nodes]

    def functions() -> list[str]:
        return [frame.name for frame in proxy.CapturedTraceback.extract().summary()]

    from torch.fx import proxy

    whole = proxy.CapturedTraceback
    with torch_private.keeping_frames(lambda file: file == kept, inside=inside):
        assert proxy.CapturedTraceback is not whole
        assert len(functions()) < 20
        with ThreadPoolExecutor(1) as pool:
            assert {"functions", "run"} <= set(pool.submit(functions).result())
        found = []
        for described in (proxy.CapturedTraceback, whole):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(proxy, "CapturedTraceback", described)
                found.append(stacks())
        assert found[0] == found[1]
    assert proxy.CapturedTraceback is whole


def test_loggers_of_the_tracer_have_these_names() -> None:
    """Silencing them silences what is logged below them."""
    from torch._export import non_strict_utils
    from torch._subclasses import fake_tensor
    from torch.export import _trace
    from torch.fx.experimental import symbolic_shapes

    assert fake_tensor.log.name == torch_private.FAKE_TENSOR_LOGGER
    for module, name in zip(
        (non_strict_utils, _trace, symbolic_shapes), torch_private.EXPORT_LOGGERS, strict=True
    ):
        logger = logging.getLogger(name)
        level = logger.level
        assert module.log.isEnabledFor(logging.WARNING)
        logger.setLevel(logging.ERROR)
        assert not module.log.isEnabledFor(logging.WARNING)
        logger.setLevel(level)


# Autograd.


def test_a_backward_pass_knows_itself() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(torch_private.in_backward()))
    loss = (x * x).sum()
    assert not torch_private.in_backward()
    loss.backward()
    assert seen == [True]
    assert not torch_private.in_backward()


def test_a_call_is_made_when_the_backward_pass_has_ended() -> None:
    order = []
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))

    def hook(grad):
        torch_private.at_end_of_backward(lambda: order.append("end"))

    x.register_hook(hook)
    x.register_post_accumulate_grad_hook(lambda _: order.append("x"))
    y.register_post_accumulate_grad_hook(lambda _: order.append("y"))
    (y.sin() * x).sum().backward()
    assert sorted(order[:2]) == ["x", "y"]
    assert order[2:] == ["end"]


def test_backward_passes_have_numbers() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(torch_private.backward_pass()))
    for _ in range(2):
        (x * x).sum().backward()
    assert torch_private.backward_pass() == -1
    assert len({-1, *seen}) == 3


class Kept(torch.autograd.Function):
    """The identity, whose backward notes its name and whether gradients are accumulated."""

    @staticmethod
    def forward(ctx, x, name, notes):
        ctx.name, ctx.notes = name, notes
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        adds = torch_private.will_accumulate(ctx.next_functions[0][0])
        ctx.notes.append((ctx.name, adds))
        return grad, None, None


def test_a_backward_pass_says_whether_it_accumulates() -> None:
    """And a node that keeps nothing serves any number of passes."""
    notes = []
    x = torch.ones(2, requires_grad=True)
    kept = Kept.apply(x, "x", notes)
    kept.sum().backward()
    kept.sum().backward(inputs=[x])
    torch.autograd.grad(kept.sum(), x)
    assert [adds for _, adds in notes] == [True, True, False]
    assert torch.equal(x.grad, torch.full((2,), 2.0))


def test_a_backward_pass_says_which_gradients_it_returns() -> None:
    """Of two leaves that one node passes gradients to."""
    notes = []

    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            return x + y

        @staticmethod
        def backward(ctx, grad):
            nodes = [node for node, _ in ctx.next_functions]
            notes.append([torch_private.is_returned(node) for node in nodes])
            return grad, grad

    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    both = Both.apply(x, y)
    torch.autograd.grad(both.sum(), x, retain_graph=True)
    torch.autograd.grad(both.sum(), [x, y], retain_graph=True)
    both.sum().backward(inputs=[y], retain_graph=True)
    both.sum().backward()
    assert notes == [[True, False], [True, True], [False, False], [False, False]]


def test_a_node_runs_when_it_is_ready() -> None:
    """Before all that was recorded later, and in the order of the places."""
    notes = []
    x, y, z = (torch.ones(2, requires_grad=True) for _ in range(3))
    kept = [Kept.apply(x, "x", notes), Kept.apply(y, "y", notes)]
    for place, tensor in zip((2, 1), kept, strict=True):
        torch_private.run_when_ready(tensor, place)
    later = Kept.apply(z, "later", notes)
    torch.stack([later.sin(), *kept]).sum().backward()
    assert [name for name, _ in notes] == ["y", "x", "later"]


def test_a_node_runs_in_the_place_of_another() -> None:
    """Those that were recorded later come before it, and those that were recorded before after."""
    notes = []
    leaves = [torch.ones(2, requires_grad=True) for _ in range(3)]
    first, second = (
        Kept.apply(x, name, notes) for x, name in zip(leaves, ("first", "second"), strict=False)
    )
    moved = Kept.apply(leaves[2], "moved", notes)
    torch_private.run_in_place(moved, torch_private.place_in_backward(first))
    torch_private.run_in_place(first, 0)
    torch.stack([moved, first, second]).sum().backward()
    assert [name for name, _ in notes] == ["second", "moved", "first"]


def test_who_holds_a_gradient_as_well_is_counted() -> None:
    """In C++, such as the other term of a sum for which it waits, or in Python."""

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, name: str) -> torch.Tensor:
            ctx.name = name
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            counts[ctx.name] = torch_private.references_to(grad)
            return grad, None

    counts: dict[str, tuple[int, int]] = {}
    leaf, other = (torch.ones(2, requires_grad=True) for _ in range(2))
    given = torch.ones(2)
    (Counted.apply(leaf, "alone") * 2).sum().backward()
    (Counted.apply(leaf, "first") + Counted.apply(other, "second")).pow(2).sum().backward()
    Counted.apply(leaf, "given").backward(given)
    alone = counts.pop("alone")
    # The second runs first. When the first one does, nobody else has the gradient any more.
    assert counts.pop("first") == alone
    assert all(count != alone for count in counts.values())


def test_hooks_on_a_gradient_lie_in_dictionaries() -> None:
    """By the numbers of their handles. What is written there runs in place of the hook."""
    x = torch.ones(2, requires_grad=True)
    assert torch_private.gradient_hooks_of(x) == (None, None)
    ran = []
    handle = x.register_hook(lambda grad: ran.append("first"))
    x.register_post_accumulate_grad_hook(lambda x: ran.append("second"))
    on_tensor, after = torch_private.gradient_hooks_of(x)
    assert list(on_tensor) == [handle.id]
    assert len(after) == 1
    on_tensor[handle.id] = lambda grad: ran.append("other")
    x.sum().backward()
    assert ran == ["other", "second"]
    handle.remove()
    assert not torch_private.gradient_hooks_of(x)[0]


def test_hooks_on_saved_tensors_are_noticed() -> None:
    assert not torch_private.saved_tensors_hooks_are_set()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert torch_private.saved_tensors_hooks_are_set()
    assert not torch_private.saved_tensors_hooks_are_set()


def test_writing_to_a_tensor_counts_up_its_version() -> None:
    """Views count with what they are views of; writing to `data` does not count."""
    x = torch.zeros(4)
    assert x._version == 0
    x[1:].add_(1)
    assert (x._version, x[2:]._version) == (1, 1)
    x.data.add_(1)
    assert x._version == 1


def test_a_module_holds_its_parts_in_dictionaries() -> None:
    module = nn.BatchNorm1d(2)
    module.register_buffer("extra", torch.zeros(1), persistent=False)
    module.register_parameter("absent", None)
    assert list(module._parameters) == ["weight", "bias", "absent"]
    assert module._parameters["absent"] is None
    assert list(module._buffers) == ["running_mean", "running_var", "num_batches_tracked", "extra"]
    assert module._non_persistent_buffers_set == {"extra"}
    assert nn.Sequential(module)._modules == {"0": module}
    module._parameters["weight"] = replacement = nn.Parameter(torch.ones(2))
    assert module.weight is replacement


REGISTRATIONS = (
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
)


@pytest.mark.parametrize("registration", REGISTRATIONS)
def test_a_registered_hook_is_in_a_dictionary_of_its_module_and_makes_a_handle(
    registration: str,
) -> None:
    """The handle is one more of those of the process, whatever else registers hooks."""
    module = nn.Linear(2, 2)
    dictionaries = torch_private.call_hooks_of([module])
    handles = torch_private.hook_handles_so_far()
    handle = getattr(module, registration)(lambda *_: None)
    assert sum(map(len, dictionaries)) == 1
    assert torch_private.hook_handles_so_far() == handles + 1
    handle.remove()
    assert sum(map(len, dictionaries)) == 0


def test_checkpoint_classes(tmp_path: Path) -> None:
    """They and the public ones are all that a checkpoint's table of contents names."""
    with pytest.warns(UserWarning, match=r"torch.distributed"):
        dcp.save({"x": torch.ones(2)}, checkpoint_id=tmp_path)
    named: set[tuple[str, str]] = set()

    class Names(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            named.add((module, name))
            return super().find_class(module, name)

    with (tmp_path / ".metadata").open("rb") as file:
        Names(file).load()
    private = {(module, name) for module, name in named if name.startswith("_")}
    assert private == set(torch_private.checkpoint_classes())


def test_forward_gradients() -> None:
    from torch.autograd import forward_ad

    assert not torch_private.forward_gradients_are_on()
    with forward_ad.dual_level():
        assert torch_private.forward_gradients_are_on()
    assert not torch_private.forward_gradients_are_on()


def test_global_hooks() -> None:
    seen: list[int] = []
    modules: Any = nn.modules.module
    for place, kind in enumerate(("forward_pre", "forward", "full_backward_pre", "full_backward")):
        handle = getattr(modules, f"register_module_{kind}_hook")(lambda *_: seen.append(1))
        assert [len(hooks) for hooks in torch_private.global_call_hooks()] == [
            int(index == place) for index in range(4)
        ]
        handle.remove()


def test_outside_of_transforms() -> None:
    """A value that is computed outside is a constant for the transform."""

    def square(x: torch.Tensor) -> torch.Tensor:
        assert torch_private.in_function_transform()
        with torch_private.outside_transforms():
            assert not torch_private.in_function_transform()
            scale = torch.ones(()) * 3
        return scale * x * x

    x = torch.tensor(2.0)
    assert float(torch.func.grad(square)(x)) == 12.0
    assert float(torch.func.jvp(square, (x,), (x,))[1]) == 24.0
    with torch_private.outside_transforms():
        assert not torch_private.in_function_transform()


def test_all_tensors_of_a_list() -> None:
    tensors = [torch.tensor([3.0, -4.0]), torch.ones(2, 2)]
    for order, expected in ((2.0, [5.0, 2.0]), (1.0, [7.0, 4.0]), (float("inf"), [4.0, 1.0])):
        norms = torch_private.norms_of(tensors, order, torch.float64)
        assert [float(norm) for norm in norms] == expected
        assert all(norm.dtype == torch.float64 for norm in norms)
    torch_private.multiply_all_(tensors, torch.tensor(2.0))
    assert tensors[0].tolist() == [6.0, -8.0]


@pytest.mark.parametrize("whole", [True, False])
def test_frames_are_given_to_the_compiler_unless_it_is_put_aside(whole: bool) -> None:
    seen: list[bool] = []

    def noted(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.compiler.is_compiling())
        return x + 1

    def outer(x: torch.Tensor) -> torch.Tensor:
        """Run as it is, and call the same function aside from the compiler and with it."""
        compiler = torch_private.frame_compiler()
        seen.append(torch_private.wants_full_graph(compiler))
        assert torch_private.set_frame_compiler(None) is compiler
        noted(x)
        torch_private.set_frame_compiler(compiler)
        return noted(x)

    torch._dynamo.reset()
    torch_private.run_as_python(outer.__code__)
    assert torch_private.frame_compiler() is None
    torch.compile(outer, backend="eager", fullgraph=whole)(torch.ones(2))
    assert seen == [whole, False, True]
    assert torch_private.frame_compiler() is None


def test_a_broken_graph_says_why() -> None:
    def breaks(x: torch.Tensor) -> torch.Tensor:
        torch_private.break_graph("no graph holds this")
        return x + 1

    assert torch.equal(torch.compile(breaks, backend="eager")(torch.ones(2)), torch.full((2,), 2.0))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="no graph holds this"):
        torch.compile(breaks, backend="eager", fullgraph=True)(torch.ones(2))


def test_truncated_normal_replaced() -> None:
    """Within, the function is asked for every fill; afterwards torch's own is back."""
    seen = []

    def note(original: Any, tensor: torch.Tensor, *bounds: float, generator: Any) -> torch.Tensor:
        seen.append((bounds, generator))
        return original(tensor, *bounds, generator=generator)

    weight = torch.empty(100)
    with torch_private.truncated_normal_replaced(note):
        torch.nn.init.trunc_normal_(weight, std=3.0, a=-1.0, b=2.0)
    assert seen == [((0.0, 3.0, -1.0, 2.0), None)]
    assert -1.0 <= float(weight.min()) < 0 < float(weight.max()) <= 2.0
    torch.nn.init.trunc_normal_(weight)
    assert len(seen) == 1


def test_parts_of_norms() -> None:
    """Clipping and loss scaling of torch call one of them with the gradients."""
    called: set[Any] = set()

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.add(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    parameter = nn.Parameter(torch.ones(3))
    for clip in (torch.nn.utils.clip_grad_norm_, torch.nn.utils.get_total_norm):
        called.clear()
        parameter.grad = torch.ones(3).as_subclass(Watched)
        clip([parameter if clip is torch.nn.utils.clip_grad_norm_ else parameter.grad], 1.0)
        assert called & torch_private.parts_of_norms()
    assert hasattr(torch, "_amp_foreach_non_finite_check_and_unscale_")


def test_pipeline_order() -> None:
    """Torch's tables of passes, of one stage on each rank and of several, whole or in halves."""
    looped = torch_private.pipeline_order("ScheduleInterleaved1F1B", 2, 2, 4)
    assert [len(order) for order in looped] == [16, 16]
    assert looped[1][:3] == [(1, "F", 0), (1, "F", 1), (3, "F", 0)]
    halves = torch_private.pipeline_order("ScheduleInterleavedZeroBubble", 2, 1, 3)
    assert {kind for _, kind, _ in halves[0]} == {"F", "I", "W"}
    alone = torch_private.pipeline_order("ScheduleGPipe", 2, 1, 2)
    assert alone[0] == [(0, "F", 0), (0, "F", 1), (0, "B", 0), (0, "B", 1)]


def test_as_if_exported_has_the_flags_of_an_export() -> None:
    """Within, code is told that a graph is made of it; afterwards it is not."""
    with torch_private.as_if_exported():
        assert torch.compiler.is_compiling()
        assert torch.compiler.is_exporting()
    assert not torch.compiler.is_compiling()
    assert not torch.compiler.is_exporting()

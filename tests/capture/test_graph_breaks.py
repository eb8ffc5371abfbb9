"""Models that cannot be captured whole: their largest parts that can are split, the rest runs."""

from __future__ import annotations

import functools
import itertools
import operator
from typing import Any

import pytest
import torch
from broad_cases import share_of
from broken_models import LAYERS, MIDDLES, WIDTH, build, inputs
from families import relative_error, worst_gradient
from quick_links import QUICK_LINKS
from torch import nn

import autoparallel
from autoparallel.capture.export import capture
from autoparallel.errors import CaptureError, PlanError
from autoparallel.mesh import Mesh
from autoparallel.parallel.common_numbers import common_numbers
from autoparallel.placement import Invariant, Shard
from autoparallel.plan import Plan
from autoparallel.runtime.groups import thread_groups
from autoparallel.runtime.rng import Generator
from autoparallel.view.report import plan_text


class Drops(nn.Module):
    """Two products; a draw compared with a number decides whether the second one is left out."""

    def __init__(self, compare: Any, one: Any = lambda: torch.rand([])) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.compare, self.one = compare, one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.compare(self.one()):
            return x
        return self.second(x)


@pytest.mark.parametrize(
    ("compare", "dropped"),
    [
        (lambda draw: draw < 0.0, False),
        (lambda draw: draw <= -1, False),
        (lambda draw: draw < 1, True),
        (lambda draw: draw >= 0.0, True),
        (lambda draw: operator.gt(1.0, draw), True),
        (lambda draw: draw == 2, False),
        (lambda draw: (draw < 0.0).any(), False),
    ],
)
@pytest.mark.parametrize("one", [lambda: torch.rand([]), lambda: torch.rand(1)])
def test_draws_know_their_range(compare: Any, dropped: bool, one: Any) -> None:
    """Layer-drop at probability 0 or 1 is no choice: the graph has the path taken always."""
    captured = capture(Drops(compare, one), (torch.randn(3, WIDTH),), {})
    products = [node for node in captured.graph.calls if node.target == "aten.linear.default"]
    assert len(products) == (1 if dropped else 2)


@pytest.mark.parametrize(
    "compare",
    [
        lambda draw: draw < 0.5,
        lambda draw: draw <= 0.0,
        lambda draw: draw * 2 < 0.0,
        lambda draw: draw < torch.zeros(()),
        lambda draw: -draw > 0.5,
    ],
)
def test_draws_within_their_range_decide_nothing(compare: Any) -> None:
    """And what is computed from a draw has another range."""
    with pytest.raises(CaptureError, match="branches on the values"):
        capture(Drops(compare), (torch.randn(3, WIDTH),), {})


def expected(model: nn.Module, batch: dict[str, Any], passes: int = 1) -> list[Any]:
    """Loss and gradients of the unsplit model, which draws what a split one does."""
    generator, found = Generator(), []
    for _ in range(passes):
        with common_numbers(generator, thread_groups(2)[0]):
            output = model(**batch)
        model.zero_grad()
        output["loss"].backward()
        named = model.named_parameters(remove_duplicate=False)
        gradients = {path: own.grad.clone() for path, own in named if own.grad is not None}
        found.append((output["loss"].detach(), gradients))
    return found


# The parts of the middle that are split.
BLOCKS = tuple(f"middle.blocks.{index}" for index in range(LAYERS))
WANTED = {
    "Keeping": tuple(f"{block}.{name}" for block in BLOCKS for name in ("norm", "up", "down")),
    "Counts": (*BLOCKS, "middle.norm"),
}


@pytest.mark.parametrize("name", share_of(MIDDLES, 5))
def test_what_can_be_traced_is_split(name: str) -> None:
    """Loss and every gradient in float64; the largest traceable modules are the parts."""
    batch = inputs()
    # Small parts are split as large ones are.
    plan = autoparallel.make_plan(build(name), 2, example_inputs=batch, hardware=QUICK_LINKS)
    assert plan.breaks[0].path == ""
    parts = {path for part in plan.parts for path in part.paths}
    assert parts == {"embed", "first", "last", "head", *WANTED.get(name, BLOCKS)}
    assert all(item.reason for item in plan.breaks)
    assert autoparallel.Plan.from_json(plan.to_json()) == plan
    result = autoparallel.simulate(build(name), 2, example_inputs=batch, plan=plan)
    ((loss, gradients),) = expected(build(name), batch)
    assert relative_error(result.output["loss"], loss) < 1e-12
    assert worst_gradient(dict(result.gradients), gradients)[0] < 1e-10
    assert set(result.collectives) == {"all_reduce", "all_gather", "reduce_scatter"}


def test_equal_parts_share_a_plan() -> None:
    """Also those that the example run happened to leave out, and equal ones elsewhere."""
    plan = autoparallel.make_plan(build("Drops"), 2, example_inputs=inputs())
    assert ("first", *BLOCKS, "last") in [part.paths for part in plan.parts]
    assert plan.storage["middle.blocks.2.up.weight"] == (Shard(0),)
    assert plan.storage["middle.scale"] == (Invariant(),)
    # The tied head, which computes more than the look-up, decides how both are stored.
    assert plan.storage["embed.weight"] == (Shard(0),)
    assert plan.split_flops > 0.99


@pytest.mark.broad
def test_a_published_model_drops_layers() -> None:
    """Hugging Face's OPT: layers are left out alike on all ranks. Its loss is in float32."""
    import transformers

    config = transformers.OPTConfig(
        vocab_size=97, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=4, ffn_dim=64,
        num_attention_heads=4, max_position_embeddings=32, dropout=0.0, layerdrop=0.5,
        use_cache=False,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.OPTForCausalLM(config).double().train()
    ids = torch.randint(3, 97, (2, 9))
    batch = {"input_ids": ids, "labels": ids}
    result = autoparallel.simulate(model, 2, example_inputs=batch)
    ((loss, gradients),) = expected(model, batch)
    layers = {path.split(".")[3] for path in gradients if ".layers." in path}
    assert 0 < len(layers) < 4
    assert relative_error(result.output["loss"], loss) < 1e-6
    assert worst_gradient(dict(result.gradients), gradients)[0] < 1e-5


def keyed(forward: Any) -> Any:
    """A decorator that sets a keyword argument, as Hugging Face's do."""

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["twice"] = True
        return forward(self, *args, **kwargs)

    return run


class Keyed(nn.Linear):
    @keyed
    def forward(self, x: torch.Tensor, twice: bool = False) -> torch.Tensor:
        return super().forward(x) * (2 if twice else 1)


def test_keyword_arguments_stay_keyword_arguments() -> None:
    """A decorated forward that is called with a keyword sees no position for it."""
    model = Keyed(4, 4)
    x = torch.randn(3, 4)
    parallel = autoparallel.autoparallelize(model, 1, example_inputs={"x": x, "twice": False})
    assert not parallel.plan.breaks
    assert torch.equal(parallel(x, twice=False), model(x, twice=False))


def hooked(model: nn.Module) -> list[str]:
    """Hooks that change what goes in and comes out, on the model, a part and a module inside."""
    calls: list[str] = []

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, result: Any) -> Any:
            calls.append(name)
            return {**result, "loss": result["loss"] * 2} if name == "model" else result * 1.5

        return hook

    model.register_forward_hook(after("model"))
    model.first.register_forward_hook(after("part"))
    model.first.up.register_forward_hook(after("inside"))
    model.first.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return calls


@pytest.mark.parametrize("broken", [True, False])
def test_hooks_run_once(broken: bool) -> None:
    """A hook that keeps a list is seen, so that Python runs it, wherever its module is."""
    model = build("Branches")
    if not broken:
        model.middle = model.middle.blocks[0]
    calls = hooked(model)
    ((loss, gradients),) = expected(model, inputs())
    calls.clear()
    parallel = autoparallel.autoparallelize(model, 1, example_inputs=inputs())
    assert "_forward_hooks of" in " ".join(item.reason for item in parallel.plan.breaks)
    calls.clear()
    own = parallel(**inputs())["loss"]
    assert relative_error(own.detach(), loss) < 1e-12
    assert calls == ["inside", "part", "model"]
    own.backward()
    named = parallel.named_parameters(remove_duplicate=False)
    assert worst_gradient({n: p.grad for n, p in named if p.grad is not None}, gradients)[0] < 1e-10


def test_views_of_a_plan_in_parts(tmp_path: Any) -> None:
    """The report says what is Python and why; the picture has all parts."""
    plan = autoparallel.make_plan(build("Branches"), 2, example_inputs=inputs())
    text = plan_text(plan)
    assert "Branches.forward branches on the values of a tensor" in text
    assert "broken_models.py" in text
    assert "middle.blocks.{0..2}.up.weight" in text
    autoparallel.write_svg(plan, tmp_path / "plan.svg")
    picture = (tmp_path / "plan.svg").read_text()
    assert "middle.blocks.{0..2}" in picture


def test_strict_capture_lists_all_breaks() -> None:
    for call in (autoparallel.make_plan, autoparallel.autoparallelize):
        with pytest.raises(CaptureError) as raised:
            call(build("Packed"), 1, example_inputs=inputs(), strict_capture=True)
        for name in ("Packed.forward", "LSTM.forward", "broken_models.py", "middle.recurrent"):
            assert name in str(raised.value)


class Hopeless(nn.Module):
    """Its only submodule with parameters cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Branching()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale if float(x.detach().sum()) > 0 else x


@pytest.mark.parametrize(
    ("name", "asked"), [("memory_limit", "1GiB"), ("constraints", ["* is whole"])]
)
def test_what_parts_cannot_keep_is_refused(name: str, asked: Any) -> None:
    """Each part would keep it alone, and all of them together not."""
    with pytest.raises(PlanError, match=f"{name}: not for a model that is planned in parts"):
        autoparallel.make_plan(
            build("Branches"), mesh=Mesh(dp=2, tp=2), example_inputs=inputs(), **{name: asked}
        )


def test_errors_say_what_to_do() -> None:
    """Nothing to split; no weights to run with; inputs that do not work."""
    with pytest.raises(CaptureError, match="nothing of Hopeless can be split") as raised:
        autoparallel.make_plan(Hopeless(), 2, example_inputs=torch.randn(3, WIDTH))
    assert "inner: Branching.forward branches" in str(raised.value)
    with pytest.raises(CaptureError, match="real weights"):
        autoparallel.make_plan(build("Branches").to("meta"), 2, example_inputs=inputs())
    batch = inputs()
    batch["x"] = batch["x"] + 31
    with pytest.raises(CaptureError, match="example run of Model failed"):
        autoparallel.make_plan(build("Branches"), 2, example_inputs=batch)


def test_the_example_run_leaves_no_trace() -> None:
    """Buffers, attributes, hooks and generators are as before."""
    model = build("Counts")
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    state = {path: value.clone() for path, value in model.state_dict().items()}
    numbers = torch.get_rng_state()
    autoparallel.make_plan(model, 2, example_inputs=inputs())
    assert torch.equal(numbers, torch.get_rng_state())
    assert all(torch.equal(state[path], value) for path, value in model.state_dict().items())
    for path, module in model.named_modules():
        assert vars(module).keys() == before[path].keys()
        assert all(vars(module)[name] is value for name, value in before[path].items())
        assert not module._forward_pre_hooks


class Dropping(nn.Module):
    """Dropout in a block that is called several times, in Python and in front of a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(WIDTH, 20), nn.Dropout(0.5), nn.Linear(20, WIDTH))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        calls = [self.block(x) for _ in range(3)]
        y = nn.functional.dropout(sum(calls), 0.5, self.training)
        return (
            (y if float(y.detach().sum()) != 0.123 else x) * torch.rand([]).double()
        ).sum(), calls


def test_random_numbers_are_the_plans_at_no_world_size() -> None:
    """Masks differ from call to call and are the same at 1, 2 and 4 ranks; the user's generator is
    left alone."""
    torch.manual_seed(2)
    model, x = Dropping().double(), torch.randn(6, WIDTH).double()
    results = []
    for world_size in (1, 2, 4):
        torch.manual_seed(world_size)
        results.append(autoparallel.simulate(model, world_size, example_inputs=x,
                                             backward=lambda output: output[0]))  # fmt: skip
    loss, calls = results[0].output
    assert all(relative_error(one, two) > 0.1 for one, two in itertools.pairwise(calls))
    for other in results[1:]:
        assert relative_error(other.output[0], loss) < 1e-12
        gradients = dict(other.gradients)
        assert worst_gradient(gradients, dict(results[0].gradients))[0] < 1e-10
    parallel = autoparallel.autoparallelize(model, 1, example_inputs=x)
    torch.manual_seed(4)
    first, second = (parallel(x)[0].detach() for _ in range(2))
    drawn = torch.rand([])
    torch.manual_seed(4)
    torch.empty(2, dtype=torch.int64).random_()  # one number for each pass, to tell repeats
    assert drawn == torch.rand([])
    assert relative_error(first, second) > 1e-3


class Mapped(nn.Module):
    """A large product inside of a function transform, and a small one that can be split."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Linear(24, 24, bias=False), nn.Linear(24, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        h, _ = torch.func.vjp(lambda rows: torch.tanh(rows @ self.large.weight), x)
        return self.small(h).square().mean()


def test_products_that_stay_python_are_not_split() -> None:
    plan = autoparallel.make_plan(Mapped(), 2, example_inputs=torch.randn(6, 24))
    assert plan.breaks[0].flops == 24 / 32
    assert plan.split_flops == plan.split_parameter_bytes == 8 / 32
    assert Plan.from_json(plan.to_json()).split_flops == 8 / 32


class Catching(Mapped):
    """It goes another way where the trace refuses the first one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        try:
            with torch.inference_mode():
                h = self.large(x)
        except Exception:
            return self.small(x).square().mean()
        return self.small(h.clone()).square().mean()


def test_refusals_that_the_model_catches_count() -> None:
    plan = autoparallel.make_plan(Catching(), 2, example_inputs=torch.randn(6, 24))
    assert "enters torch.inference_mode" in plan.breaks[0].reason

"""Split programs by random costs, and compare the result of all ranks with that of one."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from changed_plans import gathered_anew
from fuzz_programs import Program
from fuzz_second import Second, split_second, whole_second
from noted_copies import noted_copies
from torch.nn.attention import SDPBackend, sdpa_kernel

import autoparallel
from autoparallel.capture.export import capture
from autoparallel.capture.graph_builder import require_known_sizes
from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import CaptureError, UnsupportedOpError
from autoparallel.graph.graph import Sym
from autoparallel.graph.passes.run_passes import run_passes
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.parallel.simulate import Simulation, simulate_plan
from autoparallel.placement import layout_text
from autoparallel.plan import Plan
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.planning.solution_to_plan import plan_of_solution
from autoparallel.strategy.build_network import build_network
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.mesh_strategies import MeshStrategy, joint_strategies
from autoparallel.support.pytree import flatten
from planners import Factor, Problem, TooWideError, Variable, exact

__all__ = ["Coverage", "Split", "Subject", "UnfitError"]

TOLERANCE = 1e-9
_MOST_ENTRIES = 2**20
# Of the ways to compute an op, so many are drawn at most for a plan.
_MOST_WAYS = 16
_RANDOM = re.compile(
    r"drop|rand|bernoulli|normal[._(]|multinomial|exponential|poisson|rrelu|uniform|cauchy|geometric"
)
_REFUSED = (
    "needs to know whether",
    "writes to input",
    "writes to parameter",
    "depends on the values of another",
    "computes with a tensor's value in Python",
    "the forward returns a view of",
    "branches on the values of a tensor",
)


class UnfitError(Exception):
    """An UnfitError says that torch itself cannot run a program, or capture rightly refuses it."""


@dataclass(frozen=True)
class Split:
    """A Split says how to split a program. seed: of the costs.

    conversions: about how much a conversion costs for each unit that an op costs. sizes: of the
    mesh's axes, where it has several. whole: by how much an op costs more if it is unsplit.
    sparing: some copies are dropped and made again, some neighbouring ops are run again. remaking:
    so are some single ops.
    """

    world_size: int
    seed: int = 0
    conversions: float = 0.3
    data_parallel: bool = False
    sequence_parallel: bool = True
    whole: float = 0.0
    sizes: tuple[int, ...] = ()
    sparing: bool = False
    remaking: bool = False

    @property
    def mesh(self) -> Mesh:
        """The mesh of the ranks."""
        sizes = self.sizes or (self.world_size,)
        return Mesh(**{f"axis{axis}": size for axis, size in enumerate(sizes)})


@dataclass(repr=False)
class Coverage:
    """A Coverage counts the kinds of ops, placements and conversions that were tried.

    tried: what was tried last.
    """

    programs: int = 0
    refused: int = 0
    other_sizes: int = 0
    traced_again: int = 0
    twice: int = 0
    worlds: Counter[int] = field(default_factory=Counter)
    strategies: dict[str, Counter[str]] = field(default_factory=dict)
    conversions: Counter[str] = field(default_factory=Counter)
    tried: Any = ()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Write it short, because hypothesis writes it with every example."""
        printer.text("Coverage()")

    def add(self, plan: Plan) -> None:
        """Count the choices of a plan."""
        self.worlds[plan.world_size] += 1
        for op in plan.ops:
            sides = (", ".join(map(layout_text, side)) for side in (op.operands, op.results))
            self.strategies.setdefault(op.target, Counter())[" -> ".join(sides)] += 1
        for row in plan.conversions:
            self.conversions[f"{layout_text(row.source)} -> {layout_text(row.target)}"] += 1

    def __str__(self) -> str:
        rows = [
            f"{self.programs} programs, {self.refused} of them refused by capture; "
            f"{sum(self.worlds.values())} plans, on "
            + ", ".join(f"{size} ranks {count}" for size, count in sorted(self.worlds.items()))
            + f"; {self.other_sizes} runs with other sizes of the inputs, "
            f"{self.traced_again} of them traced again; {self.twice} plans differentiated twice",
            f"{sum(map(len, self.strategies.values()))} strategies of {len(self.strategies)} ops:",
        ]
        for target, found in sorted(self.strategies.items()):
            rows.append(f"  {target}: {len(found)} strategies in {sum(found.values())} calls")
        rows.append(f"{len(self.conversions)} kinds of conversions:")
        rows += [f"  {kind}: {count}" for kind, count in sorted(self.conversions.items())]
        return "\n".join(rows)


@dataclass
class _Ran:
    """A _Ran is the result of one run.

    outputs: flat. gradients: of parameters by path, of inputs by position. buffers: by path.
    """

    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


class Subject:
    """A Subject is a program that is captured once, to be split in many ways."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.model = program.model()
        inputs = tuple(program.arguments())
        self.expected = self.whole(inputs)
        try:
            captured = capture(self.model, inputs, {})
            self.captured = replace(captured, graph=run_passes(captured.graph))
            # Such a model runs as Python.
            require_known_sizes(self.captured.graph)
        except CaptureError as error:
            if any(reason in str(error) for reason in _REFUSED):
                raise UnfitError(str(error)) from error
            raise

    @cached_property
    def draws(self) -> bool:
        """True if the program draws random numbers."""
        return _RANDOM.search(self.program.text) is not None

    @cached_property
    def alone(self) -> Plan:
        """The plan of one rank, which draws what all ranks draw."""
        return self.plan(Split(1))

    def whole(self, inputs: tuple[torch.Tensor, ...]) -> _Ran:
        """Return torch's own result. Raises UnfitError where there is none or numbers run away."""
        model = copy.deepcopy(self.model)
        try:
            output = model(*inputs)
            outputs, _ = flatten(output)
            loss_of(output).backward()
        except (RuntimeError, IndexError, ValueError, UserWarning) as error:
            raise UnfitError(str(error)) from error
        gradients = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
        gradients |= {str(i): t.grad for i, t in enumerate(inputs) if t.grad is not None}
        made = _Ran([tensor.detach() for tensor in outputs], gradients, dict(model.named_buffers()))
        for tensor in (*made.outputs, *gradients.values(), *made.buffers.values()):
            if tensor.is_floating_point() and not bool((tensor.abs() < 1e5).all()):
                raise UnfitError("numbers run away")
        return made

    def differentiates(self, inputs: tuple[torch.Tensor, ...]) -> bool:
        """Return whether torch can differentiate all results, those that no loss is made of too."""
        outputs, _ = flatten(copy.deepcopy(self.model)(*fresh(inputs)))
        roots = [output for output in outputs if output.requires_grad]
        try:
            torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
        except RuntimeError:
            return False
        return True

    def plan(self, split: Split) -> Plan:
        """Return the best plan by random costs."""
        options = Options(split.sequence_parallel, split.data_parallel, "dgx-a100")
        graph = with_larger_hints(self.captured, options.tokens)
        mesh = split.mesh
        try:
            with drawn_strategies(split.seed):
                network = build_network(graph, mesh, find_hardware(options.hardware), options, {})
        except UnsupportedOpError as error:
            # Torch 2.11 traces the last state of an LSTM wrongly; later releases never come here.
            if "dims in place of" not in error.what:
                raise
            raise UnfitError(str(error)) from error
        problem = randomized(network, split)
        solver = NetworkSolver(network)
        # Any plan must be right: of wide problems a rough solution does, which is found sooner.
        solver.is_searching = True
        try:
            solution = exact.solve(problem, max_table_entries=_MOST_ENTRIES, memo=solver.memo)
        except TooWideError:
            solver.is_wide = solver.several
            solution = solver(problem)
        plan = plan_of_solution(self.captured, "Model", mesh, network, solution, 1.0)
        plan = spared(plan, split.seed) if split.sparing else plan
        return remaking(plan, split.seed) if split.remaking else plan

    def check(self, split: Split, coverage: Coverage) -> None:
        """Raise AssertionError where the ranks together give something else than one."""
        plan = self.plan(split)
        coverage.add(plan)
        assert Plan.from_json(plan.to_json()) == plan
        self.compare(plan, tuple(self.program.arguments()), self.expected)
        coverage.twice += self.compare_twice(plan)
        other = self.other_sizes(split)
        if not other:
            return
        inputs = tuple(self.program.arguments(other))
        try:
            expected = self.whole(inputs)
        except UnfitError:
            return
        coverage.other_sizes += 1
        if self.captured.fits(list(inputs)):
            try:
                self.compare(plan, inputs, expected)
            except RuntimeError:
                # What torch cannot differentiate may be differentiated here, with no gradient.
                if self.differentiates(inputs):
                    raise
        elif not self.draws:
            coverage.traced_again += 1
            module = autoparallel.autoparallelize(
                self.model, 1, example_inputs=tuple(self.program.arguments())
            )
            outputs, _ = flatten(module(*inputs))
            found = {place: tensor.detach() for place, tensor in enumerate(outputs)}
            wrong = list(_apart("output", found, dict(enumerate(expected.outputs))))
            assert not wrong, "\n".join(wrong)

    def compare(self, plan: Plan, inputs: tuple[torch.Tensor, ...], expected: _Ran) -> None:
        """Compare one plan on one set of inputs."""
        if self.draws:
            expected = _ran(simulate_plan(self.model, self.alone, fresh(inputs), {}, loss_of))
        with noted_copies() as saved:
            made = simulate_plan(self.model, plan, fresh(inputs), {}, loss_of)
        # Else they would make copies again in another order, whether or not it shows here.
        assert all(numbers == saved[0] for numbers in saved), f"ranks save other copies: {saved}"
        assert made.apart <= TOLERANCE, (
            f"ranks that should hold the same are {made.apart:.3g} apart"
        )
        differences = list(_differences(_ran(made), expected))
        assert not differences, "\n".join(differences)

    @cached_property
    def expected_twice(self) -> Second | None:
        """The second derivatives, None where torch has none or they run away."""
        inputs = tuple(self.program.arguments())
        try:
            second = whole_second(self.model, inputs, loss_of)
        except RuntimeError:
            return None
        if self.draws:
            second = split_second(self.model, self.alone, fresh(inputs), loss_of)
        penalty, gradients = second
        tame = all(bool((tensor.abs() < 1e5).all()) for tensor in (penalty, *gradients.values()))
        return second if tame else None

    def compare_twice(self, plan: Plan) -> bool:
        """Compare the derivatives of a penalty on all gradients; return whether there are such."""
        # Torch's fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            if self.expected_twice is None:
                return False
            inputs = tuple(self.program.arguments())
            made = split_second(self.model, plan, inputs, loss_of)
        penalty, gradients = self.expected_twice
        differences = [
            *_apart("penalty", {"": made[0]}, {"": penalty}),
            *_apart("second gradient", made[1], gradients),
        ]
        assert not differences, "\n".join(differences)
        return True

    def other_sizes(self, split: Split) -> dict[tuple[str, int], int]:
        """Return other numbers for the sizes that capture kept symbolic."""
        rng = np.random.default_rng(split.seed + 1)
        drawn: dict[Any, int] = {}
        found: dict[tuple[str, int], int] = {}
        nodes = [node for node in self.captured.graph.nodes if node.kind == "input"]
        for name, node in zip(self.program.inputs, nodes, strict=True):
            for dim, size in enumerate(node.result.shape):
                if isinstance(size, Sym) and size.expr.is_Symbol:
                    found[name, dim] = drawn.setdefault(size.expr, int(rng.integers(2, 9)))
        return found


@contextmanager
def drawn_strategies(seed: int) -> Iterator[None]:
    """Build networks of the plainest strategy of each op, and of some others drawn by chance.

    Any plan must be right, and on several axes an op has hundreds of strategies: a few in each of
    many programs are sooner tried than all in few.
    """
    rng = np.random.default_rng(seed)

    def drawn(*asked: Any) -> tuple[MeshStrategy, ...]:
        joints = joint_strategies(*asked)
        others = min(len(joints), _MOST_WAYS) - 1
        places = 1 + rng.permutation(len(joints) - 1)[:others]
        return (joints[0], *(joints[place] for place in sorted(places)))

    with patch("autoparallel.strategy.build_network.joint_strategies", drawn):
        yield


def fresh(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return the same tensors without gradients of earlier runs."""
    return tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs)


def loss_of(output: Any) -> torch.Tensor:
    """Return the sum of the scalars that a program returns, or else of all results, weighted.

    Beside a scalar, what else is returned may be split, so that a rank has but a part of it.
    """
    tensors = [tensor for tensor in flatten(output)[0] if tensor.is_floating_point()]
    scalars = [tensor for tensor in tensors if tensor.dim() == 0]
    total = torch.zeros((), dtype=torch.float64, requires_grad=True) * 1.0
    for tensor in scalars or tensors:
        weights = torch.linspace(0.3, 1.1, tensor.numel(), dtype=torch.float64)
        total = total + (tensor * weights.reshape(tensor.shape)).sum()
    return total


def randomized(network: CostNetwork, split: Split) -> Problem:
    """Return the network with random costs; forbidden choices stay forbidden."""
    rng = np.random.default_rng(split.seed)
    problem = network.problem()

    def table(old: np.ndarray, scale: float) -> np.ndarray:
        return np.where(np.isinf(old), np.inf, rng.random(old.shape) * scale)

    variables = []
    for variable in problem.variables:
        unary = table(variable.unary, 1.0)
        choices = network.strategies.get(variable.name, ())
        for state, choice in enumerate(choices):
            unary[state] += 0.0 if any(part.tile for part in choice.parts) else split.whole
        variables.append(Variable(variable.name, unary))
    return Problem(
        tuple(variables),
        tuple(Factor(f.scope, table(f.table, split.conversions)) for f in problem.factors),
    )


def spared(plan: Plan, seed: int) -> Plan:
    """Return the plan with some copies and some neighbouring ops recomputed."""
    rng = np.random.default_rng(seed)
    conversions = tuple(
        replace(conversion, again=bool(rng.integers(2))) for conversion in plan.conversions
    )
    names = [op.name for op in plan.ops]
    ends = sorted(rng.integers(len(names) + 1, size=4).tolist())
    groups = (tuple(names[ends[0] : ends[1]]), tuple(names[ends[2] : ends[3]]))
    recomputed = tuple(group for group in groups if group)
    return gathered_anew(replace(plan, conversions=conversions, recomputed=recomputed))


def remaking(plan: Plan, seed: int) -> Plan:
    """Return the plan with some ops made again one by one: of those that may be."""
    rng = np.random.default_rng(seed)
    taken = {name for group in plan.recomputed for name in group}
    names = [
        op.name
        for op in plan.ops
        if len(op.makes) == 1 and not any(op.kernels) and not _RANDOM.search(op.target)
    ]
    some = tuple(name for name in names if name not in taken and rng.integers(2))
    return replace(plan, remade=some)


def _ran(made: Simulation) -> _Ran:
    outputs, _ = flatten(made.output)
    gradients = dict(made.gradients)
    gradients |= {str(i): t for i, t in enumerate(made.input_gradients) if t is not None}
    return _Ran(outputs, gradients, dict(made.buffers))


def _differences(made: _Ran, expected: _Ran) -> Iterator[str]:
    """Return the differences between two runs, each as a text."""
    yield from _apart("output", dict(enumerate(made.outputs)), dict(enumerate(expected.outputs)))
    yield from _apart("gradient", made.gradients, expected.gradients)
    yield from _apart("buffer", made.buffers, {p: expected.buffers[p] for p in made.buffers})


def _apart(
    what: str, made: Mapping[Any, torch.Tensor], expected: Mapping[Any, torch.Tensor]
) -> Iterator[str]:
    for key in (*expected, *(key for key in made if key not in expected)):
        one, two = made.get(key), expected.get(key)
        if one is None or two is None:
            rest = one if two is None else two
            if rest is not None and bool((rest != 0).any()):
                yield f"{what} {key}: {'missing' if one is None else 'not expected'}"
        elif (one.shape, one.dtype) != (two.shape, two.dtype):
            yield f"{what} {key}: {one.dtype}{list(one.shape)}, not {two.dtype}{list(two.shape)}"
        elif one.is_floating_point():
            away = float((one - two).abs().max()) if one.numel() else 0.0
            bound = TOLERANCE * max(1.0, float(two.abs().max()) if two.numel() else 0.0)
            if not (math.isfinite(away) and away <= bound):
                yield f"{what} {key} is off by {away:.3g}"
        elif not torch.equal(one, two):
            yield f"{what} {key} differs"

"""Plans of one case, run on all ranks and compared with the unsplit model."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from fuzz_split import Split, randomized

import autoparallel
from autoparallel.capture.graph_breaks import GraphBreaks
from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import AutoParallelError
from autoparallel.graph.captured import Captured
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.parallel.simulate import Simulation
from autoparallel.placement import Partial, Shard
from autoparallel.plan import Plan
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.planning.plan_model import fastest_plan, trace_model
from autoparallel.planning.request import make_options
from autoparallel.planning.solution_to_plan import plan_of_solution
from autoparallel.strategy.build_network import build_network

from .outcomes import TOLERANCE, Run, Values, differences
from .subjects import Case, Subject

__all__ = ["run_unsplit", "runs_of"]

# Results of these ops are whatever was in the memory: only their sizes are compared.
_UNDEFINED = ("empty_like", "new_empty", "new_empty_strided")
_DEFAULT = {"2": Mesh(tp=2), "3": Mesh(tp=3), "2x2": Mesh(dp=2, tp=2)}
_RANDOM = {"random 2": (2,), "random 3": (3,), "random 2x2": (2, 2)}
# The ways to plan the first case of a subject, the second, and so on; the last are for one without
# elements.
_WAYS: tuple[tuple[str, ...], ...] = (
    ("2", "random 3", "3", "2x2", "random 2", "random 2x2"),
    ("2", "random 3", "random 2"),
    ("3", "random 2x2"),
)
_EMPTY_WAYS = ("2", "random 3")
_OTHER_WAYS = ("random 3",)
_OTHERS = 8


@dataclass
class _Chosen:
    """The cases of a subject that are run. cases: with the ways to plan them. others: what is tried
    where none of these is split, as an op may do nothing in them. errors: of the database.
    """

    cases: list[tuple[Case, tuple[str, ...]]]
    others: list[Case]
    errors: list[str]


def _chosen(subject: Subject) -> _Chosen:
    """Return different cases of a subject: of each set of sizes the last plain one or one in the
    middle, then the first of all, then the first without elements. The second has fixed sizes.
    """
    chosen: dict[str, Case] = {}
    others: list[Case] = []
    empty: list[Case] = []
    errors: list[str] = []
    for number, source in enumerate(subject.sources):
        try:
            found = list(source())
        except Exception as error:  # the database needs a library, or another device
            errors.append(_line(error))
            continue
        empty = empty or [case for case in found if case.empty][:1]
        full = [case for case in found if not case.empty]
        plain = [case for case in full if case.plain] or full
        if plain:
            middle = plain[len(plain) // 2]
            more = [middle] if len(subject.sources) == 1 else []
            for case in (plain[-1], plain[0], *more) if not number else (middle,):
                chosen.setdefault(case.text, case)
            others += full[:: max(1, len(full) // _OTHERS)]
    some = [
        case.with_fixed_sizes if place == 1 else case for place, case in enumerate(chosen.values())
    ]
    cases = [(case, _WAYS[min(place, 2)]) for place, case in enumerate(some)]
    cases += [(case, _EMPTY_WAYS) for case in empty]
    left = {case.text: case for case in (*chosen.values(), *others)}
    return _Chosen(cases, [case.with_fixed_sizes for case in left.values()], errors)


def runs_of(subject: Subject, seed: int) -> Iterator[Run]:
    """Run all cases of a subject in all ways. seed: of the random plans.

    Example: `list(runs_of(all_subjects()[0], seed=1))`.
    """
    chosen = _chosen(subject)
    ran = split = False
    for case, ways in (*chosen.cases, *((case, _OTHER_WAYS) for case in chosen.others)):
        if split and ways is _OTHER_WAYS:
            break
        try:
            trial = _Trial(subject.name, case, seed)
        except Exception as error:  # an ordinary error of torch's, in eager mode
            chosen.errors.append(_line(error))
            continue
        ran = True
        for run in map(trial.run, ways):
            split = split or bool(run.split)
            yield run
    if not ran:
        yield Run("", "", "not run", (chosen.errors or ["it has no samples of dense tensors"])[0])


def run_unsplit(subject: Subject) -> None:
    """Run all cases of a subject with the unsplit model alone; errors of torch's are no matter."""
    chosen = _chosen(subject)
    for case in (*(case for case, _ in chosen.cases), *chosen.others):
        with contextlib.suppress(Exception):
            _eager(case, 0)


def _line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:200]


def _eager(case: Case, seed: int) -> Values:
    """Return outputs, gradients and buffers of the unsplit model, which stays as it was."""
    model = case.model
    torch.manual_seed(seed)
    model.zero_grad()
    state = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = model(*(tensor.clone() for tensor in case.inputs))
        outputs[0].backward()
    gradients = {p: t.grad.clone() for p, t in model.named_parameters() if t.grad is not None}
    buffers = {path: tensor.clone() for path, tensor in model.named_buffers()}
    model.load_state_dict(state)
    model.zero_grad()
    return _values([output.detach().clone() for output in outputs], gradients, buffers)


class _Trial:
    """One case, with the results of the unsplit model. Raises what torch raises in eager mode."""

    def __init__(self, name: str, case: Case, seed: int) -> None:
        self.case, self.seed = case, seed
        self.undefined = name in _UNDEFINED
        try:
            self.expected = _eager(case, 0)
        except RuntimeError:
            # No gradient flows through it: what it reads gets one by another way.
            case.model.detached = True
            self.expected = _eager(case, 0)
        if any(differences(_eager(case, 1), self.expected)) and not self.undefined:
            # Random numbers are the project's own, so that the reference is one rank of it.
            self.expected = self.simulated(self.plan("1"))

    @cached_property
    def traced(self) -> Captured | GraphBreaks:
        """The model's graph, or the graphs of its parts."""
        options = make_options(None, None, None, None)
        return trace_model(self.case.model, self.case.inputs, {}, options)

    def plan(self, way: str) -> Plan | None:
        """Return the plan of one way, None where there are no random ones."""
        model = self.case.model
        if way in _RANDOM:
            if isinstance(self.traced, GraphBreaks):
                return None
            sizes = _RANDOM[way]
            world_size = sizes[0] * len(sizes)
            split = Split(world_size, self.seed, 0.3, True, whole=2.0, sizes=sizes)
            return random_plan(self.traced, split)
        mesh = _DEFAULT.get(way, Mesh(tp=1))
        options = make_options(mesh if len(mesh.axes) > 1 else None, None, None, None)
        return fastest_plan(model, self.traced, (mesh,), options)

    def simulated(self, plan: Plan | None) -> Values:
        """Return what all ranks give together."""
        inputs = tuple(tensor.clone() for tensor in self.case.inputs)
        made: Simulation = autoparallel.simulate(self.case.model, plan=plan, example_inputs=inputs)
        if not (made.apart <= TOLERANCE or self.undefined):
            raise _ApartError(f"ranks that should hold the same are {made.apart:.3g} apart")
        return _values([output.detach() for output in made.output], made.gradients, made.buffers)

    def run(self, way: str) -> Run:
        """Plan the case in one way and compare."""
        rows: dict[str, object] = {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plan = self.plan(way)
                if plan is None:
                    return Run(self.case.text, way, "right", "no random plan")
                rows = _told(plan)
                wrong = list(differences(self.simulated(plan), self.expected, self.undefined))
            status, why = ("wrong", "; ".join(wrong)) if wrong else ("right", "")
            return Run(self.case.text, way, status, why[:300], **rows)  # type: ignore[arg-type]
        except _ApartError as error:
            return Run(self.case.text, way, "wrong", str(error), **rows)  # type: ignore[arg-type]
        except AutoParallelError as error:
            why = f"{error.what}: {error.why}" if error.why else error.what
            return Run(self.case.text, way, "refused", " ".join(why.split())[:300])
        except Exception as error:
            trace = traceback.format_exc()
            return Run(self.case.text, way, "crash", _line(error), trace=trace, **rows)  # type: ignore[arg-type]


class _ApartError(Exception):
    """An _ApartError says that ranks differ in what they should hold alike."""


def random_plan(traced: Captured, split: Split) -> Plan:
    """Return the best plan of a program by random costs."""
    options = Options(split.sequence_parallel, split.data_parallel, "dgx-a100")
    graph = with_larger_hints(traced, options.tokens)
    network = build_network(graph, split.mesh, find_hardware(options.hardware), options, {})
    solution = NetworkSolver(network)(randomized(network, split))
    return plan_of_solution(traced, "Model", split.mesh, network, solution, 1.0)


def _told(plan: Plan) -> dict[str, object]:
    """Return what a plan says of the subject: its ops that are split and whole, and its breaks."""
    split = whole = 0
    told: list[str] = []
    for op in plan.ops:
        if op.where.partition(".")[0] == "op":
            layouts = (*op.operands, *op.results)
            parts = any(isinstance(part, Shard | Partial) for layout in layouts for part in layout)
            split, whole = split + parts, whole + (not parts)
            if op.discovered.startswith("whole: "):
                told.append(f"{op.target}: {op.discovered.removeprefix('whole: ')}"[:300])
    # A module without parameters belongs to the one around it, which is the model itself.
    reasons = [item.reason for item in plan.breaks if item.path.partition(".")[0] in ("", "op")]
    python = " ".join(reasons[-1].split())[:300] if reasons else ""
    alone = next((text for text in told if text), "")
    return {"split": split, "whole": whole, "alone": alone, "python": python}


def _values(
    outputs: list[torch.Tensor],
    gradients: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
) -> Values:
    values = {f"output {number}": tensor for number, tensor in enumerate(outputs)}
    values |= {f"gradient of {path}": tensor for path, tensor in gradients.items()}
    return values | {f"buffer {path}": tensor for path, tensor in buffers.items()}

"""Texts of plans with a random edit, and what becomes of them: refused, equal, right or wrong."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

import autoparallel
from autoparallel.capture.graph_breaks import GraphBreaks
from autoparallel.errors import AutoParallelError, PlanError
from autoparallel.graph.captured import Captured
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.parallel.simulate import Simulation
from autoparallel.plan import Plan
from autoparallel.planning.plan_check import require_sound
from autoparallel.planning.plan_graphs import with_graphs
from autoparallel.planning.plan_model import trace_model
from autoparallel.view.report import plan_text

__all__ = ["Edited", "Mixed", "edit_one"]

# Placements that an editor may write: possible ones, and some that no tensor has.
_PLACEMENTS = (
    "I R P S(0) S(1) S(2) S(0,_blocks=2) S(0,_blocks=3) S(1,_unit=2) S(0,_unit=3) S(7) X "
    "S(0,_blocks=0) S(-1) S(99999999999)"
).split()
_NUMBERS = [0, 1, 2, 3, 7, -1, 2**31, 2**64, 10**400, 0.5, -2.5, True, None, "", "7", [], {}, [[]]]
_TOLERANCE = 1e-10


class Mixed(nn.Module):
    """A model with what rules differ in: look-ups, norms, products, views, softmax, random numbers,
    buffers and a loss.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 12)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 24)
        self.down = nn.Linear(24, 12, bias=False)
        self.head = nn.Linear(12, 10)
        self.drop = nn.Dropout(0.25)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        x = self.norm(self.embedding(tokens))
        y = self.up(x).reshape(x.shape[0], x.shape[1], 4, 6)
        scores = torch.softmax(y @ y.transpose(-1, -2), -1)
        x = x + self.drop(self.down((scores @ y).flatten(2)))
        logits = self.head(x)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        return loss, logits


@dataclass
class Edited:
    """Plans of one model on one mesh, edited and tried.

    options: of the planner. counts: of what became of them.
    """

    model: nn.Module
    inputs: Any
    mesh: Mesh
    options: dict[str, Any] = field(default_factory=dict)
    GOOD: ClassVar = ("refused", "equal", "right")

    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.plan = autoparallel.make_plan(
            self.model,
            mesh=self.mesh,
            example_inputs=self.inputs,
            **(self.options or {"product_weight": 1e6}),
        )
        self.text = self.plan.to_json()
        self.traced: Captured | GraphBreaks = trace_model(
            self.model, (self.inputs,), {}, Options(data_parallel=True)
        )
        whole = autoparallel.make_plan(self.model, 1, example_inputs=self.inputs)
        self.expected = self.run(whole)

    def run(self, plan: Plan) -> Simulation:
        return autoparallel.simulate(self.model, plan=plan, example_inputs=self.inputs)

    def tried(self, text: str) -> str:
        """Return what becomes of a text: "refused", "equal", "right", or words on what is wrong.

        Any other error than the project's own passes through.
        """
        outcome = self._tried(text)
        self.counts[outcome] += 1
        return outcome

    def _tried(self, text: str) -> str:
        try:
            plan = Plan.from_json(text)
            if plan == self.plan:
                return "equal"
            # It is shown without its model, too.
            repr(plan)
            plan_text(plan)
            if plan.world_size > 8:
                return "right"  # as many threads would say nothing more
            plan = with_graphs(plan, self.traced)
            require_sound(plan, self.model)
        except PlanError:
            return "refused"
        plan_text(plan)
        autoparallel.timeline(plan)
        try:
            made = self.run(plan)
        except AutoParallelError as error:
            return f"refused late: {error}"
        return "right" if self.is_right(made) else "wrong"

    def is_right(self, made: Simulation) -> bool:
        """Return whether a run has the values of the unsplit one, alike on all ranks."""
        pairs = list(zip(made.output, self.expected.output, strict=True))
        pairs += [(made.gradients[path], grad) for path, grad in self.expected.gradients.items()]
        pairs += [(made.buffers[path], value) for path, value in self.expected.buffers.items()]
        return made.apart == 0 and all(
            torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE) for one, other in pairs
        )

    def edits(self, seed: int, count: int) -> Iterator[tuple[str, str]]:
        """Yield so many edits of the plan's text: what was edited, and the text."""
        draw = random.Random(seed)
        for _ in range(count):
            rows = json.loads(self.text)
            words = edit_one(rows, draw)
            # A careful editor changes what follows too: then the rules alone can tell.
            if draw.random() < 0.5:
                with suppress(Exception):
                    self.repair(rows)
                    words += ", with the conversions that follow"
            yield words, json.dumps(rows)

    def repair(self, rows: Any) -> None:
        """Write the conversions that an edited plan needs."""
        assert self.plan.captured is not None
        graph = self.plan.captured.graph
        whole = " | ".join("I" for _ in self.plan.mesh.axes)
        made = {node.result.name: whole for node in graph.nodes if node.kind != "call"}
        made.update((choice["name"], choice["storage"]) for choice in rows["parameters"])
        wanted: dict[tuple[str, str], dict[str, None]] = {}
        for op in rows["ops"]:
            for name, layout in zip(op["reads"], op["operands"], strict=True):
                wanted.setdefault((name, layout), {})[op["name"]] = None
            made.update(zip(op["makes"], op["results"], strict=True))
        for name, layout in zip(graph.outputs, rows["outputs"], strict=True):
            wanted.setdefault((name, layout), {})["return"] = None
        for path, name in graph.mutations:
            wanted.setdefault((name, whole), {})[f"write {path}"] = None
        known = {(row["value"], row["source"], row["target"]): row for row in rows["conversions"]}
        rows["conversions"] = [
            known.get((name, made[name], target))
            or {
                "value": name,
                "source": made[name],
                "target": target,
                "steps": [
                    [axis, one, other]
                    for axis, (one, other) in enumerate(
                        zip(made[name].split(" | "), target.split(" | "), strict=True)
                    )
                    if one != other
                ],
                "readers": list(readers),
                "shape": ", ".join(map(str, graph.values[name].shape)),
                "nbytes": 0,
                "requires_grad": graph.values[name].requires_grad,
            }
            for (name, target), readers in wanted.items()
            if made[name] != target
        ]
        for row in rows["conversions"]:
            row["readers"] = list(wanted[row["value"], row["target"]])


def edit_one(rows: Any, draw: random.Random) -> str:
    """Edit one place in the rows; return which, and how."""
    # Half of all edits are of layouts, of which most are still possible ones.
    wanted = draw.random() < 0.5
    every = list(_places(rows, ""))
    layouts = [(group, key, path) for group, key, path in every if _is_layout(group[key])]
    places = layouts if wanted and layouts else every
    group, key, path = draw.choice(places)
    before = group[key]
    if _is_layout(before):
        parts = before.split(" | ")
        at = draw.randrange(len(parts))
        parts[at] = draw.choice(_PLACEMENTS[: 10 if draw.random() < 0.8 else None])
        if draw.random() < 0.05:
            parts.append("I")
        group[key] = " | ".join(parts).replace("_", " ")
    elif draw.random() < 0.25:
        del group[key]
        return f"{path} deleted"
    elif isinstance(before, str):
        group[key] = draw.choice(["", before + "x", "\0", "mm", "\ud800", before[1:], 7, None])
    elif isinstance(before, list) and before and draw.random() < 0.5:
        group[key] = draw.choice([before[::-1], [*before, before[0]], before[1:]])
    elif isinstance(before, bool):
        group[key] = draw.choice([not before, 1, "true"])
    else:
        group[key] = draw.choice([*_NUMBERS, float("nan"), float("inf")])
    return f"{path}: {str(before)[:60]} -> {str(group[key])[:60]}"


def _is_layout(content: Any) -> bool:
    return isinstance(content, str) and all(
        part in ("I", "R", "P") or part.startswith("S(") for part in content.split(" | ")
    )


def _places(item: Any, path: str) -> Iterator[tuple[Any, Any, str]]:
    """Yield every place of nested lists and tables: the group, the key in it, and its path."""
    keys: Any = range(len(item)) if isinstance(item, list) else list(item)
    for key in keys:
        inner = f"{path}/{key}"
        yield item, key, inner
        if isinstance(item[key], (list, dict)):
            yield from _places(item[key], inner)

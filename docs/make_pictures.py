"""Makes the pictures of the documentation again: `python docs/make_pictures.py`.

Every figure and line of text in them that comes from a model is computed, so a picture that no
longer tells the truth changes when it is made again. The same sources give the same files.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import graphviz
import pygraphviz
import torch
from torch import nn

import autoparallel
from autoparallel import Mesh, Plan
from autoparallel.cost.hardware import find_hardware
from autoparallel.graph.graph import Graph
from autoparallel.placement import Invariant, Partial, Replicate, Shard, movement
from autoparallel.strategy.build_network import build_network
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.support.units import seconds_text
from autoparallel.train.models import GPT, GPTConfig
from autoparallel.view.dot import write_svg
from autoparallel.view.threads_svg import write_threads
from planners import exact

HERE = Path(__file__).parent
HARDWARE, RANKS, TOKENS, WIDTH, INNER = "dgx-a100", 2, 8192, 1024, 4096

FONT, CODE = "DejaVu Sans,Verdana,sans-serif", "DejaVu Sans Mono,Menlo,monospace"
GREY, LINE, FORWARD, BACKWARD = "#546e7a", "#78909c", "#c2185b", "#6a3fa0"
# The colours that plans are drawn in, see autoparallel/view/dot.py.
FILL = {"I": "#eceff1", "R": "#cdeee0", "S": "#cfe6f7", "P": "#fbe0b4", "": "#f5f7f8"}


class MLP(nn.Module):
    """Two products with a function between them: what a transformer's feed-forward layer is."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, WIDTH) to the same."""
        return self.down(torch.relu(self.up(x)))


def main() -> None:
    """Write all pictures beside this file."""
    model = GPT(GPTConfig(layers=2, hidden=1024, heads=16, dropout=0.0))
    plan = autoparallel.make_plan(model, 2, sequence_parallel=False, hardware="dgx-2h")
    write_svg(plan, HERE / "gpt_block.svg", within="blocks.1")
    write_threads(plan, HERE / "threads.svg")
    with torch.device("meta"):
        mlp, tokens = MLP(), torch.zeros(TOKENS, WIDTH)
    plan = autoparallel.make_plan(
        mlp, RANKS, example_inputs=(tokens,), hardware=HARDWARE, sequence_parallel=False
    )
    graph = plan.graphs[0]
    network = build_network(graph, Mesh(tp=RANKS), find_hardware(HARDWARE), plan.options)
    write(road(plan, graph, network), "road.svg", "dot")
    write(placements(), "placements.svg", "neato")
    write(cost_network(network), "cost_network.svg", "dot")


def write(graph: graphviz.Digraph, name: str, engine: str) -> None:
    """Draw a graph with the engine that comes with pygraphviz: no `dot` is needed."""
    picture = pygraphviz.AGraph(string=graph.source)
    picture.draw(HERE / name, format=Path(name).suffix.removeprefix("."), prog=engine)


def canvas(name: str, **attributes: str) -> graphviz.Digraph:
    """An empty picture. Its ground is white, so that it reads on light and on dark pages."""
    graph = graphviz.Digraph(name)
    graph.attr("graph", fontname=FONT, fontsize="11", bgcolor="white", pad="0.2", **attributes)
    graph.attr("node", fontname=FONT, fontsize="11", shape="plain")
    graph.attr("edge", fontname=FONT, fontsize="10", color=LINE, arrowsize="0.7")
    return graph


def card(title: str, about: str, code: Iterable[str], colour: str, width: int = 0) -> str:
    """A box with a title, a remark, and lines of code, as a label."""
    rows = [f'<TR><TD ALIGN="LEFT"><B>{escape(title)}</B>  {small(about)}</TD></TR>']
    rows += [f'<TR><TD ALIGN="LEFT">{coded(line)}</TD></TR>' for line in code]
    wide = f' WIDTH="{width}"' if width else ""
    return (
        f'<<TABLE BORDER="1" COLOR="{LINE}" BGCOLOR="{colour}" STYLE="ROUNDED" CELLBORDER="0" '
        f'CELLPADDING="2"{wide}>{"".join(rows)}</TABLE>>'
    )


def small(text: str, colour: str = GREY) -> str:
    """A remark. A table of no text is refused by the engine, a space is not."""
    return f'<FONT POINT-SIZE="10" COLOR="{colour}">{escape(text) or " "}</FONT>'


def coded(line: str) -> str:
    """A line of code, indented as it was."""
    text = escape(line).replace(" ", "&#160;")
    return f'<FONT FACE="{CODE}" POINT-SIZE="9">{text}</FONT>'


def road(plan: Plan, graph: Graph, network: CostNetwork) -> graphviz.Digraph:
    """From a module to a parallel module: the values, and the packages that lead to the next."""
    source = [inspect.getsource(MLP.forward).splitlines()[-1].strip()]
    calls = [str(node) for node in graph.nodes if node.kind == "call"]
    problem = network.problem()
    states = [f"{variable.name} ({variable.size})" for variable in problem.variables]
    rows = [f"{row.path:<12} {', '.join(map(str, row.storage)):<5}" for row in plan.parameters]
    cost = f"cost {seconds_text(plan.cost)}, lower bound {seconds_text(plan.lower_bound)}"
    program = autoparallel.emitted_program(plan, rank=0).splitlines()
    body = [line.strip() for line in program if re.search(r" = .*(linear|relu)", line)]
    stages = (
        ("nn.Module", "the user's model, whole", source),
        ("Graph", "ops that read and write named values", calls),
        (
            "CostNetwork",
            f"{len(problem.variables)} variables, {len(problem.factors)} tables of seconds",
            ["states of each: " + ", ".join(states[:3]), " " * 16 + ", ".join(states[3:])],
        ),
        ("Plan", "a placement for everything, and the proof", [*rows, cost]),
        ("nn.Module", "one rank's part, same class, same names", body),
    )
    ways = (
        (
            ("capture", "traces the model with torch.export"),
            ("graph/passes", "make explicit what a split must see"),
        ),
        (
            ("rules, discovery", "say how each op may be split"),
            ("strategy, cost", "say what each choice takes"),
        ),
        (
            ("planners", "choose a state for every variable"),
            ("planning", "keeps limits, reads the plan"),
        ),
        (
            ("rewrite", "prints the program of one rank"),
            ("parallel, runtime", "put it into the module, and run it"),
        ),
    )
    picture = canvas("road", rankdir="TB", ranksep="0.55", nodesep="0.6")
    for place, (title, about, code) in enumerate(stages):
        picture.node(str(place), card(title, about, code, FILL[""], 500))
    for place, packages in enumerate(ways):
        rows = [
            f'<TR><TD ALIGN="LEFT">{coded(name)}</TD><TD ALIGN="LEFT">{small(text)}</TD></TR>'
            for name, text in packages
        ]
        label = f'<<TABLE BORDER="0" CELLPADDING="1">{"".join(rows)}</TABLE>>'
        picture.edge(str(place), str(place + 1), label=label, penwidth="1.6")
    told = ["analysis  memory, time, bytes sent", "view      reports, pictures"]
    picture.node("tell", card("What it takes", "", told, "white"))
    picture.edge("3", "tell", style="dashed", constraint="false")
    with picture.subgraph() as level:
        level.attr(rank="same")
        level.node("3")
        level.node("tell")
    return picture


def placements() -> graphviz.Digraph:
    """The four placements on two ranks, and six moves with what they do forward and backward."""
    shown = {
        "I": ("I  Invariant", "one value, held by both", "1 2 3 4", "1 2 3 4", (0.0, 3.4)),
        "R": ("R  Replicate", "used differently by each", "1 2 3 4", "1 2 3 4", (5.2, 3.4)),
        "P": ("P  Partial", "the sum is the value", "1 0 5 1", "0 2 -2 3", (0.0, 0.0)),
        "S": ("S(0)  Shard", "a part each", "1 2", "3 4", (5.2, 0.0)),
    }
    kinds = {"I": Invariant(), "R": Replicate(), "P": Partial(), "S": Shard(0)}
    picture = canvas("placements", splines="line", outputorder="edgesfirst")
    for key, (title, about, first, second, (x, y)) in shown.items():
        ranks = "".join(
            f'<TD BORDER="1" BGCOLOR="white" COLOR="{LINE}" CELLPADDING="5">{small(name)}<BR/>'
            f"{coded(text)}</TD>"
            for name, text in (("rank 0", first), ("rank 1", second))
        )
        label = (
            f'<<TABLE BORDER="1" COLOR="{LINE}" BGCOLOR="{FILL[key]}" STYLE="ROUNDED" '
            f'CELLBORDER="0" CELLSPACING="5"><TR><TD COLSPAN="2"><B>{title}</B></TD></TR>'
            f'<TR><TD COLSPAN="2">{small(about)}</TD></TR><TR>{ranks}</TR></TABLE>>'
        )
        picture.node(key, label, pos=f"{x},{y}!")
    megatron = {
        ("I", "R"): "Megatron's f",
        ("P", "I"): "Megatron's g",
        ("S", "R"): "f, sequence parallel",
        ("P", "S"): "g, sequence parallel",
    }
    labels = {
        ("I", "R"): (2.6, 3.4),
        ("P", "I"): (0.0, 1.7),
        ("P", "S"): (2.6, 0.0),
        ("S", "R"): (5.2, 1.7),
        ("I", "S"): (2.6, 1.7),
    }
    names = {"none": "nothing", "slice": "slice"}
    backward = {"I": "I", "R": "P", "P": "R", "S": "S"}
    for (source, target), (x, y) in labels.items():
        moves = [
            movement(kinds[source], kinds[target]),
            movement(kinds[backward[target]], kinds[backward[source]]),
        ]
        texts = [names.get(move.value, move.value.replace("_", "-")) for move in moves]
        rows = [
            small(f"forward: {texts[0]}", FORWARD),
            small(f"backward: {texts[1]}", BACKWARD),
        ]
        if (source, target) in megatron:
            rows.insert(0, small(megatron[source, target]))
        cells = "".join(f"<TR><TD>{row}</TD></TR>" for row in rows)
        label = f'<<TABLE BORDER="0" BGCOLOR="white" CELLPADDING="1">{cells}</TABLE>>'
        name = f"{source}{target}"
        picture.node(name, label, pos=f"{x},{y}!")
        picture.edge(source, name, arrowhead="none", penwidth="1.6")
        picture.edge(name, target, penwidth="1.6")
    return picture


def cost_network(network: CostNetwork) -> graphviz.Digraph:
    """The network of the MLP: its variables with their states, and one of its tables in full."""
    problem = network.problem()
    best = exact.solve(problem).assignment
    picture = canvas("cost_network", rankdir="LR", ranksep="0.22", nodesep="0.3")
    for variable in problem.variables:
        texts = states_of(network, variable.name)
        label = states(variable.name, texts, variable.unary, best[variable.name])
        picture.node(identifier(variable.name), label)
    for place, factor in enumerate(problem.factors):
        first, second = factor.scope
        name = f"table {place}"
        if {first, second} == {"linear", "relu"}:
            label = table(factor.table, best[first], best[second])
        else:
            rows, columns = factor.table.shape
            label = (
                f'<<TABLE BORDER="1" COLOR="{LINE}" BGCOLOR="white"><TR><TD BORDER="0">'
                f"{small(f'{rows} × {columns}')}</TD></TR></TABLE>>"
            )
        picture.node(name, label)
        picture.edge(identifier(first), name, arrowhead="none")
        picture.edge(name, identifier(second), arrowhead="none")
    return picture


def identifier(name: str) -> str:
    """A variable's name without colons, which in DOT say where on a box an edge ends."""
    return name.replace(":", " ")


def states_of(network: CostNetwork, name: str) -> list[str]:
    """The states of a variable in words: placements of operands and results."""
    if name in network.storages:
        return [layouts([choice.storage]) for choice in network.storages[name]]
    if name in network.strategies:
        return [
            f"{layouts(choice.operands)} → {layouts(choice.results)}"
            for choice in network.strategies[name]
        ]
    return [layouts([layout]) for layout in network.outputs[name.partition(":")[2]]]


def layouts(values: Sequence[Sequence[Any]]) -> str:
    """Layouts of one mesh axis."""
    return ", ".join(str(layout[0]) for layout in values)


def states(name: str, texts: Sequence[str], seconds: Any, chosen: int) -> str:
    """A variable as a label: a row for each state with its seconds, the chosen one marked."""
    rows = [f'<TR><TD COLSPAN="2"><B>{escape(name)}</B></TD></TR>']
    for place, (text, cost) in enumerate(zip(texts, seconds, strict=True)):
        colour = f' BGCOLOR="{FILL["S"]}"' if place == chosen else ""
        rows.append(
            f'<TR><TD ALIGN="LEFT"{colour}>{coded(text)}</TD>'
            f'<TD ALIGN="RIGHT"{colour}>{small(price(cost))}</TD></TR>'
        )
    return (
        f'<<TABLE BORDER="1" COLOR="{LINE}" BGCOLOR="{FILL[""]}" STYLE="ROUNDED" CELLBORDER="0" '
        f'CELLSPACING="1">{"".join(rows)}</TABLE>>'
    )


def table(entries: Any, row: int, column: int) -> str:
    """A table of seconds as a label, the entry of the chosen states marked."""
    lines = []
    for first, costs in enumerate(entries):
        cells = []
        for second, cost in enumerate(costs):
            colour = f' BGCOLOR="{FILL["S"]}"' if (first, second) == (row, column) else ""
            cells.append(f'<TD ALIGN="RIGHT"{colour}>{small(price(cost))}</TD>')
        lines.append(f"<TR>{''.join(cells)}</TR>")
    return (
        f'<<TABLE BORDER="1" COLOR="{LINE}" BGCOLOR="white" CELLBORDER="0" CELLSPACING="1">'
        f"{''.join(lines)}</TABLE>>"
    )


def price(seconds: float) -> str:
    """Seconds in words; what cannot be has none."""
    return "–" if seconds == float("inf") else "0" if seconds == 0 else seconds_text(seconds)


if __name__ == "__main__":
    main()

"""A plain Llama, and its steps in the layouts and with the software of torchtitan's figures.

The model is planned to the family of layouts of each row, and priced as any user's. The software of
the rows differed from the emitted module in this:
- Parameters were gathered, and gradients scattered, beside computing (FSDP2): what is exposed is
  what takes longer than all computing.
- Recomputation: "op" keeps attention, scatters and every second product, and makes the rest again,
  gathers of activations too;
  "layer" makes every second layer again, "full" every layer.
- DTensor gathers along the first dim, and copies what lies elsewhere: a sequence behind its batch
  (torch/distributed/_functional_collectives.py, of gather_dim and scatter_dim). Emitted modules lay
  out such values so that no copy is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoparallel.analysis.communication import Transfer, moves
from autoparallel.capture.graph_breaks import trace
from autoparallel.cost.collective_times import movement_seconds
from autoparallel.cost.hardware import find_hardware
from autoparallel.graph.captured import Captured
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.placement import Invariant, Movement, Placement, Shard
from autoparallel.plan import Plan
from autoparallel.planning.solution_to_plan import plan_of_solution
from autoparallel.rules.lookup import find_rule
from autoparallel.strategy.build_network import build_network
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.layout_families import families, states_of_family
from planners import Solution, exact

__all__ = ["Llama", "captured_llama", "partition", "tokens_per_second"]


class Block(nn.Module):
    """A layer: attention with rotary positions and grouped heads, and a gated feed-forward."""

    def __init__(self, hidden: int, heads: int, groups: int, inner: int) -> None:
        super().__init__()
        self.size = hidden // heads
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q = nn.Linear(hidden, heads * self.size, bias=False)
        self.k = nn.Linear(hidden, groups * self.size, bias=False)
        self.v = nn.Linear(hidden, groups * self.size, bias=False)
        self.o = nn.Linear(heads * self.size, hidden, bias=False)
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the layer's result."""
        y = self.norm1(x)
        q, k, v = (
            weight(y).unflatten(2, (-1, self.size)).transpose(1, 2)
            for weight in (self.q, self.k, self.v)
        )
        y = functional.scaled_dot_product_attention(
            _turned(q, cos, sin), _turned(k, cos, sin), v, is_causal=True, enable_gqa=True
        )
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return queries or keys turned by their positions."""
    one, two = x.chunk(2, dim=-1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1)


class Llama(nn.Module):
    """The model, with its loss."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, heads = row["hidden"], row["heads"]
        self.embedding = nn.Embedding(row["vocabulary"], hidden)
        self.blocks = nn.ModuleList(
            Block(hidden, heads, row["groups"], row["inner"]) for _ in range(row["layers"])
        )
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, row["vocabulary"], bias=False)
        half = hidden // heads // 2
        self.register_buffer("cos", torch.zeros(row["sequence"], half, dtype=torch.bfloat16))
        self.register_buffer("sin", torch.zeros(row["sequence"], half, dtype=torch.bfloat16))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the loss."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x)).float()
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@lru_cache(maxsize=4)
def captured_llama(sizes: tuple[tuple[str, int], ...], batch: int) -> Captured:
    """Return the model of these sizes, traced for so many sequences."""
    row = dict(sizes)
    with torch.device("meta"):
        model = Llama(row).to(torch.bfloat16)
        tokens = torch.zeros(batch, row["sequence"], dtype=torch.long)
    traced = trace(model, (tokens, tokens), {}, known=find_rule)
    assert isinstance(traced, Captured)
    return traced


def partition(captured: Captured) -> dict[str, Placement]:
    """Return how tensor parallelism splits the parameters: products by columns, then by rows."""
    by_name: dict[str, Placement] = dict.fromkeys(
        ("q", "k", "v", "gate", "up", "embedding", "head"), Shard(0)
    )
    by_name |= dict.fromkeys(("o", "down"), Shard(1))
    return {
        node.target: by_name.get(node.target.split(".")[-2], Invariant())
        for node in captured.graph.nodes
        if node.kind == "parameter"
    }


def tokens_per_second(model: Mapping[str, int], row: Mapping[str, Any]) -> float:
    """Return the predicted tokens per second and device of one row of published.json.

    model: its sizes. row: "data" and "tensor", the ranks that share the batch, with parameters
    split among them, and those that share products and the sequence between them; "batch",
    sequences of one group of tensor-parallel ranks; "recompute"; "hardware".
    """
    mesh = Mesh(dp=row["data"], tp=row["tensor"])
    batch = row["batch"] * row["data"]
    captured = captured_llama(tuple(model.items()), batch)
    options = Options(data_parallel=True, tokens=1)
    network = build_network(captured.graph, mesh, find_hardware(row["hardware"]), options)
    name = "batch (parameters split) on dp" + ", tensor and sequence on tp" * (row["tensor"] > 1)
    family = next(each for each in families(network) if str(each) == name)
    problem = network.problem()
    found = exact.solve(problem.among(states_of_family(network, family)))
    plan = plan_of_solution(
        captured, "Llama", mesh, network, Solution.of(problem, found.assignment, "", 0.0), 1.0
    )
    parameters = {parameter.name for parameter in plan.parameters}
    work = sum(op.seconds for op in plan.ops)
    gathers = sum(c.seconds for c in plan.conversions if c.value in parameters)
    moved = sum(c.seconds for c in plan.conversions if c.value not in parameters)
    update = plan.seconds - work - gathers - moved
    again = 0.0
    for op in plan.ops:
        if op.where.startswith("blocks."):
            again += op.forward_seconds * _share_again(row["recompute"], op.target, op.whole_flops)
    again += _moved_again(plan, network, row["recompute"])
    copied = _copied(plan, network, row["recompute"])
    seconds = work + again + moved + copied + update + max(gathers - work, 0.0)
    return batch * model["sequence"] / mesh.world_size / seconds


def _moved_again(plan: Plan, network: CostNetwork, recompute: str) -> float:
    """Return the seconds in which activations are moved again in the backward pass: gathered, and
    unless what was scattered is kept, scattered too.
    """
    sizes = network.edges.sizes
    seconds = sum(
        movement_seconds(
            move.movement,
            move.nbytes,
            network.edges.hardware,
            network.edges.links[axis],
            sizes[axis],
        )
        for move in _made_again(plan, network, recompute)
        for axis in (move.step.axis,)
    )
    return seconds * (0.5 if recompute == "layer" else 1.0)


def _made_again(plan: Plan, network: CostNetwork, recompute: str) -> list[Transfer]:
    """Return the moves of activations that a recomputation repeats."""
    return [
        move
        for move in moves(plan)
        if move.phase == "forward" and move.conversion.value not in network.storages
        if recompute != "op" or move.movement is Movement.ALL_GATHER
    ]


def _copied(plan: Plan, network: CostNetwork, recompute: str) -> float:
    """Return the seconds of copying gathered parts into place, and parts that are scattered."""
    sent = [move for move in moves(plan) if move.conversion.value not in network.storages]
    nbytes = sum(
        move.nbytes
        for move in (*sent, *_made_again(plan, network, recompute))
        if move.movement in (Movement.ALL_GATHER, Movement.REDUCE_SCATTER)
    )
    # All of it is read and written.
    return 2 * nbytes / network.edges.hardware.sustained_bytes_per_second


def _share_again(recompute: str, target: str, flops: float) -> float:
    """Return the share of an op's forward pass that is made again in the backward pass."""
    if recompute == "op":
        return 0.0 if "attention" in target else 0.5 if flops else 1.0
    return {"full": 1.0, "layer": 0.5}[recompute]

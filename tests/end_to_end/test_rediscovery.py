"""Megatron's partition comes out of the cost alone, on models the planner knows nothing about."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from broad_cases import broad, one_of_each, share_of
from families import HIDDEN, TRANSFORMERS, VOCABULARY, build, inputs_for, loss_and_logits
from processes import run_processes
from quick_links import QUICK_LINKS
from releases import attention_without_heads

import autoparallel
from autoparallel.analysis.communication import transfers
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.placement import Invariant, Shard
from autoparallel.plan import Plan
from autoparallel.planning.search import search
from autoparallel.runtime.collective_counter import CollectiveCounter
from megatron_rules.recipe import partition, recipe

BATCH, SEQUENCE = 3, 10
TOKENS = BATCH * SEQUENCE * HIDDEN
Case = tuple[str, bool]


@cache
def both_ways(name: str, layers: int) -> tuple[Plan, Plan]:
    """Plans for two ranks without sequence parallelism and with it, of one trace."""
    whole = autoparallel.make_plan(
        build(name, layers).float(),
        2,
        example_inputs=inputs_for(name, BATCH, SEQUENCE),
        sequence_parallel=False,
        hardware=QUICK_LINKS,
    )
    assert whole.captured is not None
    options = replace(whole.options, sequence_parallel=True)
    return whole, search(whole.captured, whole.model, whole.mesh, options)


# Of these `make test` counts; of the others `make broad` does.
SOME = TRANSFORMERS[::2]


def plan_all(names: tuple[str, ...]) -> None:
    for name, layers in itertools.product(names, (3, 5)):
        both_ways(name, layers)


def count(rank: int, names: tuple[str, ...]) -> dict[Case, Any]:
    """Collectives of the running module, forward and backward, with three layers and with five."""
    torch.set_num_threads(1)
    found: dict[Case, Any] = {}
    for name, layers in itertools.product(names, (3, 5)):
        inputs, model = inputs_for(name, BATCH, SEQUENCE), build(name, layers).float()
        for sequence_parallel, plan in enumerate(both_ways(name, layers)):
            parallel = autoparallel.apply_plan(model, plan, check_inputs=0)
            with CollectiveCounter() as forward:
                loss, _ = loss_and_logits(parallel(**inputs))
            with CollectiveCounter() as backward:
                loss.backward()
            rows = found.setdefault((name, bool(sequence_parallel)), [])
            rows.append([[(e.kind, e.numel) for e in c.events] for c in (forward, backward)])
    return found


@cache
def counts_of(names: tuple[str, ...]) -> dict[Case, Any]:
    """Several families in one launch of two processes, planned before it."""
    before = partial(plan_all, names)
    results: dict[Case, Any] = run_processes(count, 2, names, timeout_seconds=400, before=before)[0]
    return results


def counted(name: str, sequence_parallel: bool) -> Any:
    """Return the counts of one family."""
    names = SOME if name in SOME else tuple(each for each in TRANSFORMERS if each not in SOME)
    return counts_of(names)[name, sequence_parallel]


def per_layer(fewer: list[Any], more: list[Any]) -> Counter[tuple[str, int]]:
    """What each further layer adds."""
    added = Counter(map(tuple, more))
    added.subtract(Counter(map(tuple, fewer)))
    assert all(number % 2 == 0 for number in added.values())
    return Counter({key: number // 2 for key, number in added.items() if number})


@pytest.mark.parametrize("name", share_of(TRANSFORMERS, 2))
def test_two_all_reduces_forward_and_two_backward(name: str) -> None:
    """arXiv:1909.08053, section 3: nothing else crosses the links in a layer."""
    fewer, more = counted(name, False)
    for direction in (0, 1):
        layer = per_layer(fewer[direction], more[direction])
        assert layer == {("all_reduce", TOKENS): 2}


@pytest.mark.parametrize("name", share_of(TRANSFORMERS, 2))
def test_sequence_parallelism_takes_their_place(name: str) -> None:
    """arXiv:2205.05198, section 4.2.2. Gradients of norms and biases take one sum for all."""
    fewer, more = counted(name, True)
    for direction in (0, 1):
        runs = [
            [event for event in run[direction] if event[0] != "all_reduce"] for run in (fewer, more)
        ]
        layer = per_layer(*runs)
        assert layer == {("all_gather", TOKENS): 2, ("reduce_scatter", TOKENS): 2}
        sums = [sum(kind == "all_reduce" for kind, _ in run[direction]) for run in (fewer, more)]
        assert sums == ([1, 1] if direction else [2, 2])


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", share_of(TRANSFORMERS, 2))
def test_logits_never_cross_the_links(name: str, sequence_parallel: bool) -> None:
    """The largest tensor exchanged is far smaller than the (b, s, V) logits."""
    for run in counted(name, sequence_parallel):
        assert max(numel for events in run for _, numel in events) < BATCH * SEQUENCE * VOCABULARY


@cache
def traced(name: str) -> Plan:
    """A plan whose graph is that of all."""
    return autoparallel.make_plan(build(name), 1, example_inputs=inputs_for(name))


def planned(name: str, world_size: int, options: Options, **demands: Any) -> Plan:
    plan = traced(name)
    assert plan.captured is not None
    return search(plan.captured, plan.model, Mesh(tp=world_size), options, **demands)


@pytest.mark.parametrize("world_size", [*broad(2), 4])
@pytest.mark.parametrize("name", share_of(TRANSFORMERS, 2))
def test_weights_are_split_as_published(name: str, world_size: int) -> None:
    """Column then row, heads, fused weights in three blocks, the tied table by vocabulary."""
    plan = planned(name, world_size, Options(sequence_parallel=False))
    published = partition(build(name))
    for parameter in plan.parameters:
        expected = published[parameter.path]
        inside = re.search(r"\.\d+\.", parameter.path)
        if inside or (len(parameter.shape) == 2 and name != "hf-llama" and expected != Invariant()):
            assert parameter.storage == (expected,), parameter.path
    inner = [op for op in plan.ops if op.whole_flops and re.search(r"\.\d+\b", op.where)]
    assert inner
    assert all(op.flops < op.whole_flops for op in inner)
    heads = [op for op in plan.ops if "attention" in op.target]
    assert heads
    assert all(layout == (Shard(1),) for op in heads for layout in op.operands[:3])


def _pinned(name: str, options: Options, product_weight: float) -> Plan:
    """The plan that has the published partition."""
    pins = {path: (placement,) for path, placement in partition(build(name)).items()}
    return planned(name, 4, options, pins=pins, product_weight=product_weight)


# Of each transformer, `make test` has one on each machine, with sequence parallelism or without.
MACHINES = {"cpu": False, "dgx-a100": True}
WITH_RECIPES = itertools.product(TRANSFORMERS, MACHINES, (False, True))


@pytest.mark.parametrize(
    ("name", "hardware", "sequence_parallel"),
    one_of_each(WITH_RECIPES, lambda row: row[2] == MACHINES[row[1]]),
)
def test_no_dearer_than_the_recipe(name: str, hardware: str, sequence_parallel: bool) -> None:
    """Under the same objective; the recipe's plan is made as recipe.py does, of the same trace."""
    options = Options(sequence_parallel, hardware=hardware)
    own = planned(name, 4, options)
    published = _pinned(name, options, own.product_weight)
    assert own.cost <= published.cost * (1 + 1e-12)


def test_the_recipe_is_the_plan_with_its_weights() -> None:
    """What is pinned in the tests above is what the recipe says."""
    model, inputs = build("gpt"), inputs_for("gpt")
    published = recipe(model, 4, example_inputs=inputs, product_weight=1.0)
    assert published.cost == _pinned("gpt", Options(), 1.0).cost
    layouts = {parameter.path: parameter.storage for parameter in published.parameters}
    assert layouts == {path: (placement,) for path, placement in partition(model).items()}


def test_recipe_inside_of_data_parallelism() -> None:
    """The published partition on the inner of two axes, whole on the outer one."""
    model, inputs = build("gpt"), inputs_for("gpt")
    options: dict[str, Any] = {"example_inputs": inputs, "hardware": "dgx-a100"}
    published = recipe(model, mesh=Mesh(dp=2, tp=2), **options)
    expected = partition(model)
    for path, layout in published.storage.items():
        assert layout == (Invariant(), expected[path])
    own = autoparallel.make_plan(model, mesh=Mesh(dp=2, tp=2), **options)
    assert own.cost <= published.cost * (1 + 1e-12)


def test_the_planner_knows_no_names() -> None:
    """No module's or parameter's name, and no model's, stands in what decides."""
    root = Path(autoparallel.__file__).parent
    words = re.compile(
        r"attn(?!_mask)|c_fc|c_proj|qkv|lm_head|mlp|gpt|bert|llama|q_proj|wte|query_key|token_embedding"
        r"|feed_forward|[\"'.]blocks\.\d",
        re.IGNORECASE,
    )
    deciding = ("rules", "cost", "rewrite", "strategy", "planning", "graph")
    files = [
        *root.glob("*.py"),
        *(file for room in deciding for file in root.glob(f"{room}/**/*.py")),
    ]
    assert len(files) > len(deciding)
    files += list((root.parent / "planners").glob("*.py"))
    found = [
        f"{file.name}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(_code(file), 1)
        if words.search(line)
    ]
    assert not found


def _code(file: Path) -> list[str]:
    """The file's lines without docstrings and comments: what a program can act on."""
    text = re.sub(
        r'""".*?"""', lambda match: "\n" * match[0].count("\n"), file.read_text(), flags=re.S
    )
    return [line.partition("#")[0] for line in text.splitlines()]


def hugging_face(name: str, layers: int) -> torch.nn.Module:
    """A model of real width, without weights. Eight ranks, of which the last may get no head."""
    import transformers

    transformers.logging.set_verbosity_error()
    width, heads = (1600, 25) if name == "Llama" else (2048, 16)
    sizes: dict[str, Any] = {"vocab_size": 50304, "use_cache": False}
    if name == "GPTJ":
        sizes |= {"n_embd": width, "n_layer": layers, "n_head": heads, "rotary_dim": 64}
    else:
        sizes |= {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    if name == "Falcon":
        sizes |= {"num_kv_heads": 8, "new_decoder_architecture": True, "bias": False}
    if name == "Llama":
        sizes |= {"intermediate_size": 4 * width, "num_key_value_heads": heads}
    if name == "OPT":
        sizes |= {"ffn_dim": 4 * width, "word_embed_proj_dim": width}
    if name == "Phi3":
        sizes |= {"intermediate_size": 4 * width, "pad_token_id": 0}
    if name == "Gemma3":
        sizes |= {"intermediate_size": 4 * width, "num_key_value_heads": 8, "head_dim": 128}
    config = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, config)(**sizes))
    made: torch.nn.Module = model.to(torch.bfloat16).train()
    return made


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *broad(("GPTJ", 1), ("GPTNeoX", 1), ("Falcon", 1)),
        *broad(("Gemma3", 2)),
        pytest.param("Llama", 2, marks=attention_without_heads),
        *broad(("OPT", 2), ("Phi3", 2)),
    ],
)
def test_all_reduces_of_a_layer_of_other_families(name: str, expected: int) -> None:
    """Attention and MLP side by side need one, one after the other two; each way.

    However query, key and value are fused: head by head (GPT-NeoX), in groups (Falcon); with norms
    of single heads (Gemma 3), with rows flattened around the MLP (OPT), with 25 heads on 8 ranks
    (Llama), and where slices cut the fused value (Phi-3).
    """
    tokens = torch.zeros(4, 2048, dtype=torch.long)
    counts = []
    for layers in (2, 3):
        plan = autoparallel.make_plan(
            hugging_face(name, layers),
            8,
            example_inputs={"input_ids": tokens, "labels": tokens},
            sequence_parallel=False,
            hardware="dgx-a100",
        )
        assert plan.product_weight == 1
        assert plan.split_flops > 0.99
        counts.append(
            Counter(
                (sent.phase, sent.collective.value, sent.conversion.shape.split(", ")[-1])
                for sent in transfers(plan)
                if not sent.together
            )
        )
    counts[1].subtract(counts[0])
    width = "1600" if name == "Llama" else "2048"
    assert {key: count for key, count in counts[1].items() if count} == {
        (direction, "all_reduce", width): expected for direction in ("forward", "backward")
    }

"""Timelines by hand: what is exposed, what is hidden; pipelines by their closed forms."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import autoparallel
from autoparallel.analysis.pipeline import SCHEDULES, in_flight, pipeline, schedule_seconds
from autoparallel.analysis.timeline import timeline
from autoparallel.analysis.training_step import COMMUNICATION, COMPUTE, Timeline
from autoparallel.cost.hardware import Hardware, Link, Matmul
from autoparallel.errors import PlanError
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.placement import Layout, Step, parse_layout
from autoparallel.plan import Conversion, OpChoice, ParameterChoice, Plan, PlannedInput
from autoparallel.train.models import GPT, GPTConfig
from autoparallel.view.trace import trace_json

# On two ranks an all-reduce of n bytes takes n seconds, a gather or a scatter n / 2.
LINK = Link.ring(bytes_per_second=1.0, hop_seconds=0.0, floor_seconds=0.0)
HARDWARE = Hardware(
    name="test",
    source="made up",
    devices_per_node=8,
    device_memory_bytes=1,
    flops_per_second=((4, 100.0),),
    memory_bytes_per_second=1.0,
    memory_efficiency=1.0,
    launch_seconds=0.0,
    spread=0.0,
    matmul=Matmul(),
    inside=LINK,
    network=LINK,
)


def op(
    name: str,
    reads: str,
    forward: float = 1.0,
    backward: float = 2.0,
    layouts: str = "I",
    result: str = "I",
    where: str = "",
) -> OpChoice:
    """An op that makes the value of its name. reads: values; layouts: how it reads them."""
    operands = tuple(map(parse_layout, layouts.split()))
    return OpChoice(
        name=name,
        target="test",
        where=where,
        line="",
        reads=tuple(reads.split()),
        makes=(name,),
        operands=operands,
        results=(parse_layout(result),),
        kernels=("",),
        seconds=forward + backward,
        forward_seconds=forward,
        whole_flops=10.0,
    )


def conversion(value: str, ends: str, readers: str, nbytes: int = 1, **more: Any) -> Conversion:
    """ends: "I R"."""
    source, target = map(parse_layout, ends.split())
    return Conversion(
        value=value,
        source=source,
        target=target,
        steps=(Step(0, source[0], target[0]),),
        readers=tuple(readers.split()),
        shape="8",
        nbytes=nbytes,
        requires_grad=True,
        **more,
    )


def parameter(name: str, storage: str, gradient: str = "", state: str = "") -> ParameterChoice:
    layouts: list[Layout] = [parse_layout(text or storage) for text in (storage, gradient, state)]
    return ParameterChoice(name, name, (8,), 32, *layouts)


def plan_of(*items: Any, recomputed: tuple[tuple[str, ...], ...] = ()) -> Plan:
    """A plan on two ranks whose update takes no time."""
    ops = tuple(item for item in items if isinstance(item, OpChoice))
    conversions = tuple(item for item in items if isinstance(item, Conversion))
    return Plan(
        model="Test",
        mesh=Mesh(tp=2),
        options=Options(),
        hardware="test",
        fingerprint="",
        parameters=tuple(item for item in items if isinstance(item, ParameterChoice)),
        ops=ops,
        conversions=conversions,
        outputs=(),
        cost=0.0,
        lower_bound=0.0,
        method="by hand",
        seconds=sum(o.seconds for o in ops) + sum(c.seconds for c in conversions),
        product_weight=1.0,
        recomputed=recomputed,
    )


def run(plan: Plan, bucket_nbytes: int = 0, overlap: bool = True) -> Timeline:
    return timeline(plan, hardware=HARDWARE, bucket_nbytes=bucket_nbytes, overlap=overlap)


def spans(made: Timeline, stream: str) -> list[tuple[str, str, float, float]]:
    """(what, phase, start, end) of all that a stream does."""
    return [(e.name, e.phase, e.start, e.end) for e in made.events if e.stream == stream]


def test_a_collective_that_nothing_hides() -> None:
    """Two ops, a sum in between: forward 1 + 1 + 1, backward 2 + 2."""
    made = run(plan_of(op("a", "x", result="P"), conversion("a", "P I", "b"), op("b", "a")))
    assert spans(made, COMMUNICATION) == [("all-reduce of a", "forward", 1.0, 2.0)]
    assert spans(made, COMPUTE) == [
        ("a", "forward", 0.0, 1.0),
        ("b", "forward", 2.0, 3.0),
        ("b", "backward", 3.0, 5.0),
        ("a", "backward", 5.0, 7.0),
    ]
    assert (made.seconds, made.forward_seconds, made.backward_seconds) == (7.0, 3.0, 4.0)
    assert made.exposed_seconds == pytest.approx(1.0)
    # 3 x 20 FLOPs in 7 seconds at 100 FLOP/s on each of two ranks.
    assert made.mfu == pytest.approx(60 / (7 * 200))


def test_a_collective_is_waited_for_where_it_is_first_read() -> None:
    """The op that does not read the sum runs before it, as in the emitted program."""
    made = run(
        plan_of(
            op("a", "x", result="P"),
            conversion("a", "P I", "b"),
            op("aside", "x"),
            op("b", "a aside", layouts="I I"),
        )
    )
    assert spans(made, COMMUNICATION) == [("all-reduce of a", "forward", 2.0, 3.0)]
    assert made.exposed_seconds == 1.0


def products(*, overlap: bool) -> Timeline:
    """Two products that read one converted value, as query and key do: f, forward nothing."""
    late = {"target": "aten.linear.default"}
    items = [
        parameter("v", "S(0)"),
        parameter("w", "S(0)"),
        op("a", "x"),
        conversion("a", "I R", "b c", nbytes=3),
        replace(op("b", "a v", layouts="R S(0)", result="S(1)"), **late),
        replace(op("c", "a w", layouts="R S(0)", result="S(1)"), **late),
        op("d", "b c", layouts="S(1) S(1)", result="P"),
    ]
    matrices = [replace(i, shape=(8, 8)) if isinstance(i, ParameterChoice) else i for i in items]
    return run(plan_of(*matrices), overlap=overlap)


def test_weight_gradients_hide_the_gradient_of_their_input() -> None:
    """Both gradients of `a` first, then its sum beside those of the weights: 3 s behind 2."""
    made = products(overlap=True)
    assert spans(made, COMMUNICATION) == [("all-reduce of a", "backward", 8.0, 11.0)]
    assert [span for span in spans(made, COMPUTE) if span[1] == "backward"] == [
        ("d", "backward", 4.0, 6.0),
        ("c", "backward", 6.0, 7.0),
        ("b", "backward", 7.0, 8.0),
        ("c (weight)", "backward", 8.0, 9.0),
        ("b (weight)", "backward", 9.0, 10.0),
        ("a", "backward", 11.0, 13.0),
    ]
    assert made.exposed_seconds == 1.0
    waiting = products(overlap=False)
    assert spans(waiting, COMMUNICATION) == [("all-reduce of a", "backward", 10.0, 13.0)]
    assert waiting.exposed_seconds == 3.0


def test_backward_waits_for_what_the_forward_only_copied() -> None:
    """Megatron's f: nothing forward, a sum of the gradient backward, here between the ops."""
    made = run(
        plan_of(op("a", "x"), conversion("a", "I R", "b"), op("b", "a", layouts="R", result="P"))
    )
    assert spans(made, COMMUNICATION) == [("all-reduce of a", "backward", 4.0, 5.0)]
    assert made.seconds == 7.0


@pytest.mark.parametrize(("bucket", "overlap"), [(0, True), (100, True), (0, False)])
def test_sums_of_gradients_overlap_with_the_backward(bucket: int, overlap: bool) -> None:
    """That of the last op hides behind the first one's backward; that of the first cannot."""
    items = (
        parameter("w1", "I"),
        parameter("w2", "I"),
        op("a", "x w1", layouts="I R"),
        op("b", "a w2", layouts="I R"),
        conversion("w1", "I R", "a", together=True),
        conversion("w2", "I R", "b", together=True),
    )
    made = run(plan_of(*items), bucket, overlap)
    early = bucket == 0 and overlap
    sums = [(start, end) for _, _, start, end in spans(made, COMMUNICATION)]
    # Forward 2, backward 4. In buckets of one, the first sum runs beside the backward of `a`.
    assert sums == ([(4.0, 5.0), (6.0, 7.0)] if early else [(6.0, 8.0)])
    assert made.seconds == (7.0 if early else 8.0)
    assert made.exposed_seconds == pytest.approx(1.0 if early else 2.0)


def test_parameters_are_gathered_before_they_are_read() -> None:
    """ZeRO-3: forward, and again backward, where the gradient is scattered as well."""
    items: list[Any] = []
    for layer in range(3):
        items += [
            parameter(f"w{layer}", "S(0)"),
            op(f"o{layer}", f"x w{layer}", layouts="I R", where=f"blocks.{layer}"),
            conversion(f"w{layer}", "S(0) R", f"o{layer}", nbytes=2, again=True),
        ]
    made = run(plan_of(*items))
    gathers = [span for span in spans(made, COMMUNICATION) if span[0].startswith("all-gather")]
    assert gathers == [
        ("all-gather of w0", "forward", 0.0, 1.0),
        ("all-gather of w1", "forward", 2.0, 3.0),
        ("all-gather of w2", "forward", 4.0, 5.0),
        ("all-gather of w2", "backward", 6.0, 7.0),
        ("all-gather of w1", "backward", 10.0, 11.0),  # after the scatter of the gradient of w2
        ("all-gather of w0", "backward", 14.0, 15.0),
    ]
    assert made.seconds == 18.0
    assert made.exposed_seconds == 9.0


def test_zero_1_gathers_what_it_updated() -> None:
    """A part of the gradient arrives, a part is updated, the whole is gathered afterwards."""
    plan = plan_of(
        parameter("w", "I", "I", "S(0)"),
        op("a", "x w", layouts="I R"),
        conversion("w", "I R", "a", nbytes=2, together=True),
    )
    # The plan's seconds hold the optimizer's half a second, and the gather.
    made = run(replace(plan, seconds=plan.seconds + 1.5), overlap=False)
    assert spans(made, COMMUNICATION) == [
        ("reduce-scatter of gradients", "backward", 3.0, 4.0),
        ("all-gather of w", "update", 4.5, 5.5),
    ]
    assert spans(made, COMPUTE)[-1] == ("optimizer", "update", 4.0, 4.5)


def test_recomputation_runs_the_forward_again() -> None:
    """With the collectives inside of what is run again."""
    first = replace(op("a", "x", result="P"), seconds=4.0)  # forward 1 twice, backward 2
    second = replace(op("b", "a"), seconds=4.0)
    made = run(plan_of(first, conversion("a", "P I", "b"), second, recomputed=(("a", "b"),)))
    assert spans(made, COMPUTE) == [
        ("a", "forward", 0.0, 1.0),
        ("b", "forward", 2.0, 3.0),
        ("a", "recompute", 3.0, 4.0),
        ("b", "recompute", 5.0, 6.0),
        ("b", "backward", 6.0, 8.0),
        ("a", "backward", 8.0, 10.0),
    ]
    assert [(s, e) for _, _, s, e in spans(made, COMMUNICATION)] == [(1.0, 2.0), (4.0, 5.0)]
    assert made.busy(COMPUTE, "recompute") == 2.0


@pytest.fixture(scope="module")
def whole() -> Plan:
    """Plain tensor parallelism: everything waits for everything."""
    model = GPT(GPTConfig(2, hidden=64, heads=8, vocabulary=211, positions=64, dropout=0.0))
    tokens = torch.zeros(4, 32, dtype=torch.long)
    return autoparallel.make_plan(
        model,
        4,
        example_inputs=(tokens, tokens),
        sequence_parallel=False,
        hardware="dgx-a100",
        product_weight=1e4,
    )


def test_where_nothing_overlaps_it_is_the_sum(whole: Plan) -> None:
    """The planner's own prediction, reached op by op."""
    made = timeline(whole, overlap=False)
    assert made == timeline(whole, hardware=whole.hardware, overlap=False)
    assert made.busy(COMMUNICATION) > 0
    assert made.seconds == pytest.approx(whole.seconds, rel=1e-6)
    assert made.tokens == 8192
    assert made.tokens_per_second == pytest.approx(8192 / made.seconds)


def test_a_plan_that_was_read_has_the_same_events(whole: Plan) -> None:
    """And counts the same tokens."""
    read = timeline(Plan.from_json(whole.to_json()))
    assert read.events == timeline(whole).events
    assert (read.tokens, read.unit) == (8192, "tokens")


@pytest.mark.parametrize(
    ("shape", "given", "counted"),
    [
        ("s0, s1", (4, 32), (128, "tokens")),
        ("s0, 16", (4, 16), (4, "rows")),
        ("s0, 80, s1", (4, 80, 50), (200, "frames")),
        ("s0, 3, s1, s2", (4, 3, 32, 32), (4, "images")),
        ("s0, 3, 8, s1, s2", (4, 3, 8, 32, 32), (4, "clips")),
    ],
)
def test_what_a_step_counts(
    whole: Plan, shape: str, given: tuple[int, ...], counted: tuple[int, str]
) -> None:
    """Images and frames are no tokens; labels beside them are none either."""
    dims = tuple(shape.split(", "))
    largest = PlannedInput("x", "x", dims, given, given, is_integer=counted[1] == "tokens")
    labels = PlannedInput("y", "y", ("s0",), (4,), (4,), is_integer=True)
    made = timeline(replace(whole, inputs=(labels, largest)))
    assert (made.tokens, made.unit) == counted
    assert f"\n{counted[1]:15}{counted[0]:,} a step, " in str(made)


def test_a_causal_mask_hides_half() -> None:
    """Of fused attention, in whole blocks, where what is done once for each token is little; the
    FLOPs of the model stay those that papers count.
    """
    found = {}
    for causal in (False, True):
        plan = autoparallel.make_plan(
            Attention(causal), 1, example_inputs=torch.zeros(1, 2, 32768, 128), hardware="dgx-h100"
        )
        (op,) = (op for op in plan.ops if "attention" in op.target)
        found[causal] = op
    assert found[True].seconds == pytest.approx(found[False].seconds / 2, rel=0.05)
    assert found[True].whole_flops == found[False].whole_flops


class Attention(torch.nn.Module):
    """Attention with itself."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=self.causal)


def test_trace(whole: Plan) -> None:
    """Every event, in microseconds, on its stream's thread."""
    made = timeline(whole)
    rows = json.loads(trace_json(made))["traceEvents"]
    names = {row["tid"]: row["args"]["name"] for row in rows if row["ph"] == "M"}
    events = [row for row in rows if row["ph"] == "X"]
    assert len(events) == len(made.events)
    for row, event in zip(events, made.events, strict=True):
        assert (row["name"], names[row["tid"]]) == (event.name, event.stream)
        assert row["ts"] + row["dur"] == pytest.approx(event.end * 1e6)
    assert trace_json(made) == trace_json(timeline(whole))


# -- pipelines


def micro_batch(seconds: float) -> Timeline:
    """Of 10 s forward and 20 s backward; what is left of `seconds` comes after."""
    return Timeline(
        seconds=seconds,
        forward_seconds=10.0,
        backward_seconds=20.0,
        events=(),
        tokens=100,
        flops=6000.0,
        peak=100.0,
        ranks=8,
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("stages", "batches"), [(1, 1), (1, 5), (4, 1), (4, 3), (4, 16), (8, 32)])
def test_bubble(schedule: str, stages: int, batches: int) -> None:
    """(K - 1) / (M + K - 1), for both schedules (arXiv:1811.06965, arXiv:2104.04473)."""
    seconds = schedule_seconds(stages, batches, schedule, 1.0, 2.0)
    assert seconds == pytest.approx(3.0 * (batches + stages - 1))
    made = micro_batch(30.0)
    found = pipeline(made, stages, batches, schedule=schedule, activation_nbytes=8.0)
    assert found.bubble == pytest.approx((stages - 1) / (batches + stages - 1))
    assert found.tokens == 100 * batches
    assert found.mfu == pytest.approx(2.0 * (1 - found.bubble))
    held = batches if schedule == "gpipe" else min(stages, batches)
    assert (found.in_flight, found.activation_nbytes) == (held, held * 8.0 / stages)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("ranks", "rounds", "each"), [(2, 1, 2), (3, 4, 2), (4, 2, 3)])
def test_interleaved_bubble(schedule: str, ranks: int, rounds: int, each: int) -> None:
    """(K - 1) / V passes of a rank, as each of its V stages is a V-th of it (arXiv:2104.04473)."""
    batches = rounds * ranks
    seconds = schedule_seconds(ranks, batches, schedule, 1.0, 2.0, per_rank=each)
    assert seconds == pytest.approx(3.0 * (batches * each + ranks - 1))
    # A stage that takes longer is waited for by all micro-batches.
    longer = [1.5 if stage == 1 else 1.0 for stage in range(ranks * each)]
    slow = schedule_seconds(ranks, batches, schedule, longer, 2.0, per_rank=each)
    assert slow >= max(seconds, 3.0 * batches * each + 0.5 * batches)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sends_and_what_comes_after(schedule: str) -> None:
    """One micro-batch passes every boundary twice; the update is divided among the stages."""
    made = micro_batch(34.0)
    found = pipeline(made, 2, 1, schedule=schedule, send_nbytes=3.0, link=LINK)
    assert found.send_seconds == pytest.approx(3.0)
    assert found.seconds == pytest.approx(10 + 20 + 2 * 3.0 + 4.0 / 2)


def test_speed_up_as_published() -> None:
    """GPipe's table 2 (arXiv:1811.06965): speed-up over two stages and one micro-batch.

    Activations are recomputed, which costs a forward pass and needs no gradient, so that it runs
    while a stage waits. Its rows of 1 and 32 micro-batches are met, but for 8 stages without
    micro-batches (1.3); that of 4 is faster in print (1.7, 3.2, 4.8) than its own bubble allows.
    """

    def seconds(stages: int, batches: int) -> float:
        unit = 1.0 / (stages * batches)
        return schedule_seconds(stages, batches, "gpipe", unit, 2 * unit, recompute=unit)

    found = {(k, m): seconds(2, 1) / seconds(k, m) for k in (2, 4, 8) for m in (1, 4, 32)}
    printed = {(2, 1): 1.0, (4, 1): 1.07, (2, 32): 1.8, (4, 32): 3.4, (8, 32): 6.3}
    for key, value in printed.items():
        assert found[key] == pytest.approx(value, rel=0.06)
    for k in (2, 4, 8):
        assert found[k, 1] < found[k, 4] < found[k, 32]
    for m in (1, 4, 32):
        assert found[2, m] < found[4, m] < found[8, m]


def test_pipelines_refuse_what_there_is_not(whole: Plan) -> None:
    """Schedules, and numbers of stages."""
    with pytest.raises(PlanError, match="interleaved"):
        in_flight(2, 2, "interleaved")
    with pytest.raises(PlanError, match="0 stages"):
        in_flight(0, 2, "gpipe")
    with pytest.raises(PlanError, match="0 stages"):
        pipeline(timeline(whole), 0, 2)
    with pytest.raises(PlanError, match=r"2\.5 stages"):
        pipeline(timeline(whole), 2.5, 2)  # type: ignore[arg-type]

"""Explanations, closed forms and pictures of plans with stages."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from functools import cache

import pytest
import torch
from pipeline_models import Language, batch_of

import autoparallel
from autoparallel.analysis.pipeline_step import timeline_of_stages
from autoparallel.analysis.training_step import COMPUTE
from autoparallel.errors import PlanError
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan
from autoparallel.planning.stage_work import StageWork
from autoparallel.questions.explain import Explainer
from autoparallel.rewrite.stages import cut_plan
from autoparallel.view.closed_forms_text import plan_forms_text
from autoparallel.view.stages_svg import stages_svg


@cache
def planned(pins: tuple[tuple[str, object], ...] = ()) -> Plan:
    torch.manual_seed(3)
    return autoparallel.make_plan(
        Language(),
        mesh=Mesh(pp=2, tp=2),
        microbatches=4,
        example_inputs=batch_of("Language"),
        data_parallel=True,
        hardware="dgx-a100",
        pins=dict(pins),  # type: ignore[arg-type]
    )


def test_costs_are_those_of_planning_anew() -> None:
    """Of one micro-batch on all stages; and the step is that of stages which are cut anew."""
    plan = planned()
    explainer = Explainer(plan)
    assert explainer.forcing.own_cost == pytest.approx(plan.cost)
    path = "blocks.1.up.weight"
    asked = explainer.explain(path, why_not="split 1").asked
    assert asked is not None
    assert asked.plan is not None
    anew = planned(((path, asked.plan.storage[path][1:]),))
    # Of plans whose sums are near the least, planning anew takes that of the shortest step.
    assert anew.lower_bound - 1e-12 <= plan.cost + asked.added_cost <= anew.cost + 1e-12
    cut = explainer.forcing.in_stages(asked.plan)
    assert cut.pipeline is not None
    assert asked.added_step == pytest.approx(cut.step - plan.step)
    text = str(explainer.explain("blocks.1.up"))
    assert "in stage 1 of 2" in text
    assert "a micro-batch" in text
    assert "its step would be" in text


def test_copies_that_are_made_again_count() -> None:
    """Which are, the states of a plan do not tell: its seconds are those of its own rows."""
    plan, added = planned(), 1e-3
    first, *rest = plan.conversions
    again = replace(first, again=True, seconds=first.seconds + added)
    other = replace(plan, conversions=(again, *rest))
    seconds = [Explainer(each).plan.seconds for each in (plan, other)]
    assert seconds[1] - seconds[0] == pytest.approx(added)


def test_forms_are_what_stages_send_compute_and_hold() -> None:
    plan = planned()
    pipeline = plan.pipeline
    assert pipeline is not None
    assert plan.captured is not None
    forms = autoparallel.closed_forms(plan, names={16: "h"})
    assert [form.paths for form in forms.forms] == [("stage 0",), ("stage 1",)]
    count = pipeline.microbatches
    for stage, form in enumerate(forms.forms):
        # On the busiest rank, which has the larger part of what does not divide.
        for form_bytes, nbytes in (
            (form.handed_on, pipeline.nbytes[stage]),
            (form.handed_back, pipeline.back_nbytes[stage]),
        ):
            assert forms.at(form_bytes) == pytest.approx(nbytes * count, rel=1e-4)
    graph = with_larger_hints(plan.captured, plan.options.tokens)
    # What is saved is counted by the account of stages as well, and parameters in the rows.
    work = StageWork(graph, plan)
    saved = work.bytes_of().kept
    starts = [work.place[name] for name in pipeline.starts]
    ends = [*starts[1:], len(saved)]
    for form, first, end, held in zip(forms.forms, starts, ends, pipeline.in_flight, strict=True):
        assert forms.at(form.activations) == pytest.approx(held * saved[first:end].sum(), rel=0.05)
    whole = sum(op.whole_flops for op in plan.ops)
    assert forms.at(forms.total.flops, microbatch=1, tp=1) == whole
    stages = cut_plan(graph, plan)
    held_bytes = [sum(row.nbytes for row in stage.plan.parameters) for stage in stages]
    for form, most in zip(forms.forms, held_bytes, strict=True):
        assert most / 2 <= forms.at(form.parameters) <= most
    text = plan_forms_text(plan)
    assert "bytes sent to the next stage" in text
    assert "total of one rank of each stage" in text


def test_the_picture_has_all_stages_and_passes() -> None:
    """Also of a plan that was read; what is empty in it is the bubble."""
    plan = Plan.from_json(planned().to_json())
    text = stages_svg(plan)
    root = ElementTree.fromstring(text)
    titles = [title.text or "" for title in root.iter("{http://www.w3.org/2000/svg}title")]
    step = timeline_of_stages(plan, None, None, None)
    passes = [event for event in step.events if event.stream == COMPUTE]
    assert len(titles) == len(passes)
    for words in ("stage 0", "stage 1", "blocks.0", "head", "pp = 1", "2 in flight"):
        assert words in text
    with pytest.raises(PlanError, match="has no stages"):
        stages_svg(
            autoparallel.make_plan(torch.nn.Linear(4, 4), 1, example_inputs=torch.ones(2, 4))
        )
